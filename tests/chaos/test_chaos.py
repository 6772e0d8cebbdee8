"""Nothing is lost.

Whatever is killed, stopped, cut or restarted, every task that was accepted ends, or is a dead
letter.

`pytest tests/chaos --minutes 20` goes on from seed to seed, each for a minute of attacks; `--seed
N` begins with that one.
"""

import contextlib
import importlib.util
import json
import os
import random
import signal
import threading
import time
from collections import Counter, defaultdict

import pytest
from fleet import ALL, SLOTS, Fleet, marks
from redis import RedisError

SHORT = 10.0  # seconds of attacks in the normal run
LONG = 60.0
RATE = 200.0  # tasks a second
PATIENCE = 60.0  # seconds to end all tasks after the last attack
TERMS = 10.0  # seconds around an attack in which it explains that a task ran twice
DURABLE = ("--appendonly", "yes", "--appendfsync", "always")


@pytest.fixture
def fleet(make_server, tmp_path):
    """Return a function that makes a fleet of a seed."""
    with contextlib.ExitStack() as stack:

        def make(seed):
            folder = tmp_path / str(seed)
            folder.mkdir()
            made = Fleet(folder, make_server(*DURABLE, tcp=True), random.Random(seed))
            return stack.enter_context(made)

        yield make


def load(fleet):
    """Import the application as a producer, that goes to Redis without a proxy."""
    spec = importlib.util.spec_from_file_location("chaos_app", fleet.folder / "app.py")
    app = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REDIS_URL", fleet.server.url)
        spec.loader.exec_module(app)
    app.OUTAGES = RedisError
    return app


def run(fleet, seconds, *, is_attacked=True):
    """Produce and attack for some seconds, then wait until everything is settled."""
    app = load(fleet)
    is_over = threading.Event()
    producer = threading.Thread(target=fleet.produce, args=(app, is_over.is_set, RATE))
    producer.start()
    try:
        until = time.monotonic() + seconds
        if is_attacked:
            fleet.attack(until)
        else:
            is_over.wait(seconds)
    finally:
        is_over.set()
        producer.join()
        app.wakaq.broker.close()
        os.close(app.COUNTS)
    fleet.mend()


def letters(fleet):
    """Return number -> reasons of its dead letters."""
    found = defaultdict(list)
    with contextlib.closing(fleet.server.client()) as client:
        for key in client.keys("wakaq:dead:*"):
            for letter in client.lrange(key, 0, -1):
                fields = json.loads(letter)
                message = json.loads(fields["payload"])
                found[str(message["args"][0]) if message["args"] else "same"].append(
                    fields["reason"]
                )
    return found


def missing(fleet):
    """Return accepted numbers that neither ended nor are a dead letter.

    And how many equal calls are missing.
    """
    ended = Counter(number for what, number, *_ in marks(fleet.marks) if what == "end")
    dead = letters(fleet)
    lost = [n for n in fleet.accepted if not ended[n] and n not in dead]
    return lost, max(0, fleet.same - ended["same"])


def history(fleet, number):
    """Return all that is known of a task, with the attacks of its time."""
    lines = [
        f"{at:.3f} {what} by pid {pid} of {slot}"
        for what, name, slot, pid, at in marks(fleet.marks)
        if name == number
    ]
    lines += [
        f"{a.began_at:.3f} to {a.ended_at:.3f} attack: {a.what} at {a.slot}" for a in fleet.attacks
    ]
    lines.append(f"kind {fleet.accepted.get(number)}, dead letters {letters(fleet).get(number)}")
    with contextlib.closing(fleet.server.client()) as client:
        for key in client.keys("wakaq*"):
            if client.type(key) == b"hash" and b":inflight:" in key:
                held = [p for p in client.hvals(key) if f'"{number}"'.encode() in p]
                lines += [f"{key.decode()}: {payload!r}" for payload in held]
            elif client.type(key) == b"list":
                found = [p for p in client.lrange(key, 0, -1) if f'"{number}"'.encode() in p]
                lines += [f"{key.decode()}: {payload!r}" for payload in found]
            elif b"registry" in key:
                lines.append(f"{key.decode()}: {client.hkeys(key)}")
    return "\n".join(sorted(lines))


def settle(fleet, seed):
    """Wait until all tasks have ended."""
    deadline = time.monotonic() + PATIENCE
    while (lost := missing(fleet)) != ([], 0):
        if time.monotonic() > deadline:
            number = (lost[0] or ["same"])[0]
            pytest.fail(
                f"seed {seed}: {len(lost[0])} tasks and {lost[1]} equal ones are lost,"
                f" such as {number}:\n"
                f"{history(fleet, number)}\nlogs are in {fleet.folder}"
            )
        fleet.respawn()
        time.sleep(0.2)
    with contextlib.closing(fleet.server.client()) as client:
        while len(entries := living(client)) != SLOTS:  # those that were killed last are rescued
            assert time.monotonic() < deadline, (
                f"seed {seed}: {entries}\nlogs are in {fleet.folder}"
            )
            fleet.respawn()
            time.sleep(0.2)


def living(client):
    """Return who is in the registry, but for tombstones."""
    return [f for f in client.hkeys("wakaq:registry:workers") if not f.startswith(b"dead:")]


def assert_dead_letters_are_true(fleet):
    reasons = {"doomed": "raised", "stuck": "hard timeout"}
    for number, found in letters(fleet).items():
        kind = fleet.accepted.get(number)
        if kind is not None:  # else `.delay()` raised, and it was accepted all the same
            assert set(found) == {reasons.get(kind)}, history(fleet, number)


def doubles(fleet):
    """Return numbers that ran more than once, with slots and moments.

    Those that are to be tried again do not count.
    """
    starts = defaultdict(list)
    for what, number, slot, pid, at in marks(fleet.marks):
        if what == "start" and number != "same" and fleet.accepted.get(number, "flaky") != "flaky":
            starts[number].append((slot, at, pid))
    return {number: runs for number, runs in starts.items() if len(runs) > 1}


def assert_doubles_were_attacked(fleet):
    # A worker that is killed for a hard timeout takes the async tasks along that it runs beside it.
    stuck = {
        pid
        for what, number, _, pid, _ in marks(fleet.marks)
        if what == "start" and fleet.accepted.get(number) == "stuck"
    }
    for number, runs in doubles(fleet).items():
        (slot, first, _), (_, last, _) = runs[0], runs[-1]
        was_beside = any(pid in stuck for _, _, pid in runs[:-1])
        explained = (fleet.accepted.get(number) == "wait" and was_beside) or any(
            attack.slot in (slot, ALL)
            and attack.began_at - TERMS < last
            and attack.ended_at + TERMS > first
            for attack in fleet.attacks
        )
        assert explained, history(fleet, number)


def assert_nothing_is_left(fleet, seed):
    """Stop the supervisors, and look for what outlives them, in Redis and on this machine."""
    for place in fleet.places:
        place.process.send_signal(signal.SIGTERM)
    statuses = [place.process.wait(20) for place in fleet.places]
    deadline = time.monotonic() + 15
    while left := [title for place in fleet.places for title in place.pids().values()]:
        assert time.monotonic() < deadline, f"seed {seed}: processes are left: {left}"
        time.sleep(0.1)
    with contextlib.closing(fleet.server.client()) as client:
        inflight = {key: client.hvals(key) for key in client.keys("wakaq:inflight:*")}
        waiting = {
            key: client.llen(key) for key in (b"wakaq:high", b"wakaq:low") if client.exists(key)
        }
        entries = living(client)

    assert statuses == [0, 0, 0]
    assert inflight == {}, f"seed {seed}: in flight without an owner"
    assert waiting == {}
    assert entries == []


def assert_supervisors_are_sound(fleet):
    """Look for threads and descriptors that a supervisor collected while it was attacked."""
    for place in fleet.places:
        threads = len(list((fleet.proc(place.process.pid) / "task").iterdir()))
        descriptors = len(list((fleet.proc(place.process.pid) / "fd").iterdir()))
        assert place.zombies() == []
        assert threads <= 12, threads
        assert descriptors <= 60, descriptors


def assert_priorities_hold(fleet):
    """Enqueue what is urgent behind what is not: it starts before most of it."""
    app = load(fleet)
    numbers = {"low": [f"low-{n}" for n in range(200)], "high": [f"high-{n}" for n in range(20)]}
    with app.wakaq.batch():
        for queue, names in numbers.items():
            for name in names:
                app.work.delay(name, 0.02, queue=queue)
    app.wakaq.broker.close()
    os.close(app.COUNTS)

    def starts(queue):
        found = [
            at for what, n, *_, at in marks(fleet.marks) if what == "start" and n in numbers[queue]
        ]
        assert len(found) >= len(numbers[queue])
        return sorted(found)

    wait_until = time.monotonic() + 10
    while True:
        try:
            low, high = starts("low"), starts("high")
            break
        except AssertionError:
            assert time.monotonic() < wait_until, "the last tasks do not start"
            time.sleep(0.1)
    assert high[-1] < low[100]


def count_runs(fleet, tasks):
    """Have that many tasks run, and return how often each of them did; nothing is attacked."""
    app = load(fleet)
    with contextlib.closing(fleet.server.client()) as client:
        for start in range(0, tasks, 10_000):
            while client.llen("wakaq:low") > 100_000:
                time.sleep(0.1)
            with app.wakaq.batch():
                for number in range(start, min(start + 10_000, tasks)):
                    app.count.delay(number)
        done, before = 0, -1
        while done < tasks:
            assert done > before, f"{done} of {tasks} are done, and nothing moves"
            before = done
            time.sleep(5)
            done = int(client.hget("wakaq:stats:low", "done") or 0)
    app.wakaq.broker.close()
    os.close(app.COUNTS)
    return Counter(map(int, (fleet.folder / "memory" / "counts").read_text().split()))


@pytest.mark.chaos
@pytest.mark.timeout(0)
@pytest.mark.parametrize("tasks", [30_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_every_task_runs_once_where_nothing_is_attacked(fleet, tasks):
    one = fleet(0)
    runs = count_runs(one, tasks)
    assert_nothing_is_left(one, 0)

    assert len(runs) == tasks
    assert set(runs.values()) == {1}


@pytest.mark.chaos
@pytest.mark.timeout(0)
def test_nothing_is_lost(fleet, request, capsys):
    minutes = request.config.getoption("--minutes", default=0.0)
    first = request.config.getoption("--seed", default=None)
    seconds = LONG if minutes else SHORT
    seed = random.SystemRandom().randrange(1_000_000) if first is None else first
    until = time.monotonic() + minutes * 60
    while True:
        one = fleet(seed)
        run(one, seconds)
        settle(one, seed)
        assert_dead_letters_are_true(one)
        assert_doubles_were_attacked(one)
        assert_supervisors_are_sound(one)
        assert_priorities_hold(one)
        assert_nothing_is_left(one, seed)
        with capsys.disabled():
            twice = len(doubles(one))
            print(  # noqa: T201 - what a long run is for
                f"\nseed {seed}: {len(one.accepted) + one.same} tasks, {len(one.attacks)} attacks,"
                f" {twice} ran twice, 0 lost"
            )
        seed += 1
        if time.monotonic() >= until:
            return
