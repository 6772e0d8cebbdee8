"""Recycling and heartbeats.

Workers that retire, that take too much memory, and that do not answer.
"""

import os
import re
import signal

import psutil
import pytest

from wakaq.supervisor import heartbeat, memory, supervisor

APP = """
import os, time
import redis
import wakaq.supervisor.heartbeat
import wakaq.supervisor.memory
from wakaq import WakaQ
# So that nobody waits for half a minute here; users cannot set it.
wakaq.supervisor.heartbeat.SILENCE = 1.0
wakaq.supervisor.heartbeat.Heartbeat.interval = 0.1
wakaq.supervisor.memory.GRACE = 2.0
client = redis.Redis.from_url(os.environ["REDIS_URL"])
wakaq = WakaQ(queues=["default"], concurrency=2, url=os.environ["REDIS_URL"], wait_timeout=0.2)

@wakaq.task
def note(name):
    client.rpush("done", f"{os.getpid()} {name}")

@wakaq.task
def nap(seconds, name):
    client.rpush("started", f"{os.getpid()} {name}")
    time.sleep(seconds)
    client.rpush("done", f"{os.getpid()} {name}")
"""
SINGLE = APP.replace("concurrency=2", "concurrency=1")


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Undo here what the application, which is imported here, too, sets for its supervisor."""
    for owner, name in (
        (heartbeat, "SILENCE"),
        (heartbeat.Heartbeat, "interval"),
        (memory, "GRACE"),
        (supervisor, "Memory"),
        (supervisor, "EXIT_GRACE"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))


def popped(redis, count, key="done", within=10):
    """Return the next `count` elements of a list as pairs of a worker's pid and the rest."""
    found = []
    for _ in range(count):
        element = redis.blpop(key, timeout=within)
        assert element, f"only {len(found)} of {count} came: {found}"
        pid, _, rest = element[1].decode().partition(" ")
        found.append((int(pid), rest))
    return found


def assert_nothing_happened_twice(redis, done):
    assert redis.hgetall("wakaq:stats:default") == {b"done": str(done).encode()}
    assert redis.keys("wakaq:inflight:*") == []


@pytest.mark.parametrize("most", [1, 3, 10])
def test_a_worker_retires_after_exactly_so_many_tasks(start, redis, most):
    worker = start(SINGLE.replace("wait_timeout", f"max_tasks_per_worker={most}, wait_timeout"))
    with worker.app.wakaq.batch():
        for number in range(4 * most):
            worker.app.note.delay(number)
    done = popped(redis, 4 * most)
    pids = [pid for pid, _ in done]

    assert [number for _, number in done] == [str(number) for number in range(4 * most)]
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [most] * 4
    assert worker.stop() == 0
    assert_nothing_happened_twice(redis, 4 * most)
    assert "ERROR" not in worker.log
    assert "WARNING" not in worker.log


@pytest.mark.parametrize("most", [1, 2])
def test_a_worker_is_replaced_after_its_last_task_and_there_is_never_one_too_many(
    start, redis, most
):
    worker = start(SINGLE.replace("wait_timeout", f"max_tasks_per_worker={most}, wait_timeout"))
    for number in range(1, most):
        worker.app.note.delay(number)
    worker.app.nap.delay(1, "last")
    popped(redis, 1, "started")
    worker.app.note.delay("next")

    assert len(worker.workers(1)) == 1
    assert redis.llen("done") == most - 1
    done = popped(redis, most + 1)
    assert [name for _, name in done[-2:]] == ["last", "next"]
    assert done[-1][0] != done[-2][0]
    assert "Worker 1 (pid" in worker.log


def test_retiring_workers_lose_nothing_under_load(start, redis):
    worker = start(APP.replace("wait_timeout", "max_tasks_per_worker=50, wait_timeout"))
    with worker.app.wakaq.batch():
        for number in range(1_000):
            worker.app.note.delay(number)
    done = popped(redis, 1_000)
    pids = [pid for pid, _ in done]

    assert sorted(int(number) for _, number in done) == list(range(1_000))
    assert max(pids.count(pid) for pid in set(pids)) == 50
    assert worker.stop() == 0
    assert_nothing_happened_twice(redis, 1_000)


COUNTED = """
@wakaq.task
def count():
    client.rpush("at once", client.incr("running"))
    time.sleep(0.3)
    client.decr("running")
    client.rpush("done", f"{os.getpid()} count")
"""


def test_workers_of_one_task_each_are_never_more_at_once_than_asked_for(start, redis):
    worker = start(APP.replace("wait_timeout", "max_tasks_per_worker=1, wait_timeout") + COUNTED)
    worker.workers(2)
    with worker.app.wakaq.batch():
        for _ in range(20):
            worker.app.count.delay()
    pids = [pid for pid, _ in popped(redis, 20)]

    assert len(set(pids)) == 20
    assert {int(number) for number in redis.lrange("at once", 0, -1)} == {1, 2}
    assert worker.stop() == 0
    assert_nothing_happened_twice(redis, 20)


LEAK = """
import psutil

def used_percent():
    memory = psutil.virtual_memory()
    return 100 * (memory.total - memory.available) / memory.total

@wakaq.task
def leak(goes_on):
    client.rpush("started", f"{os.getpid()} leak")
    hoard = []
    while len(hoard) < 250 and (goes_on or used_percent() < wakaq.settings.max_mem_percent + 1):
        hoard.append(b"x" * 10_000_000)
        time.sleep(0.02)
    time.sleep(60 if goes_on else 1.2)
    client.rpush("done", f"{os.getpid()} leak")
"""


def limited(start, grace=2.0):
    """Start two workers whose limit is a GB above what is used now.

    A victim has `grace` seconds to end its task.
    """
    machine = psutil.virtual_memory()
    limit = 100 * (machine.total - machine.available + 1e9) / machine.total
    options = f"max_mem_percent={limit:.3f}, max_redeliveries=0, wait_timeout"
    app = APP.replace("GRACE = 2.0", f"GRACE = {grace}").replace("wait_timeout", options, 1)
    return start(app + LEAK)


@pytest.mark.timeout(40)
def test_a_leaking_task_is_caught_at_the_threshold_and_others_go_on(start, redis, eventually):
    worker = limited(start)
    worker.app.nap.delay(0, "first")
    popped(redis, 1)
    worker.app.nap.delay(5, "steady")
    worker.app.leak.delay(goes_on=True)
    pids = dict(map(reversed, popped(redis, 3, "started")))

    eventually(lambda: "is asked to stop after its task" in worker.log, within=15)
    eventually(lambda: "is killed" in worker.log, within=5)
    eventually(lambda: redis.llen("wakaq:dead:default") == 1)
    assert re.search(
        rf"Worker \d \(pid {pids['leak']}\), \d{{3,4}} MB, running leak\(goes_on=True\), is killed",
        worker.log,
    )
    assert b"it took too much memory, 1 times in all" in redis.lindex("wakaq:dead:default", 0)
    assert f"pid {pids['steady']}" not in worker.log
    assert popped(redis, 1)[0] == (pids["steady"], "steady")
    worker.app.note.delay("after")
    popped(redis, 1)
    assert len(worker.workers(2)) == 2
    assert worker.stop() == 0


@pytest.mark.timeout(40)
def test_the_heaviest_worker_may_end_its_task(start, redis, eventually):
    worker = limited(start, grace=15.0)
    worker.app.leak.delay(goes_on=False)
    ((pid, _),) = popped(redis, 1, "started")

    assert popped(redis, 1, within=20) == [(pid, "leak")]
    eventually(lambda: f"(pid {pid}) exited with status 0" in worker.log)
    assert "is asked to stop after its task" in worker.log
    assert "is killed" not in worker.log
    eventually(lambda: len(set(worker.workers(2)) - {pid}) == 2)
    assert worker.stop() == 0
    assert_nothing_happened_twice(redis, 1)


MEASURED = """
from wakaq.supervisor import memory, supervisor

def measure():
    client.incr("measured")
    return float(client.get("used"))

class Measured(memory.Memory):
    interval = 0.1

    def __init__(self, *args):
        super().__init__(*args, measure)

supervisor.Memory = Measured
"""


def test_no_worker_is_forked_while_memory_is_above_the_limit(start, redis, eventually):
    redis.set("used", 10)
    worker = start(APP.replace("wait_timeout", "max_mem_percent=50, wait_timeout", 1) + MEASURED)
    before = worker.workers(2)
    redis.set("used", 51)
    # Idle workers give their memory back by exiting, one after another.
    for pid in before:
        eventually(lambda pid=pid: f"(pid {pid}) exited with status 0" in worker.log)
    worker.app.note.delay("waits")
    measured, seen = int(redis.get("measured")), set()

    def has_measured_for_three_seconds():
        seen.update(title for title in worker.titles().values() if ": worker" in title)
        return int(redis.get("measured")) >= measured + 30

    eventually(has_measured_for_three_seconds, within=10)
    assert seen == set()
    assert redis.llen("done") == 0
    redis.set("used", 49)

    ((pid, name),) = popped(redis, 1)
    assert (pid not in before, name) == (True, "waits")
    assert not set(worker.workers(2)) & set(before)
    assert worker.stop() == 0


def test_a_worker_that_is_silent_with_no_task_is_replaced(start, redis, eventually):
    worker = start(SINGLE)
    worker.app.note.delay("first")
    ((pid, _),) = popped(redis, 1)
    eventually(lambda: redis.hget("wakaq:stats:default", "done") == b"1")
    os.kill(pid, signal.SIGSTOP)

    eventually(lambda: f"(pid {pid}) does not answer and runs nothing: killing it" in worker.log)
    worker.app.note.delay("next")
    assert popped(redis, 1)[0][0] != pid
    assert worker.stop() == 0
    assert "by us, because of: it did not answer" in worker.log


def test_a_task_that_was_sent_to_a_silent_worker_runs_elsewhere(start, redis, eventually):
    worker = start(SINGLE)
    worker.app.note.delay("first")
    ((pid, _),) = popped(redis, 1)
    eventually(lambda: redis.hget("wakaq:stats:default", "done") == b"1")
    os.kill(pid, signal.SIGSTOP)
    worker.app.note.delay("next")

    assert popped(redis, 1)[0][1] == "next"
    # It had not begun, so its worker's death is not its fault.
    eventually(lambda: redis.hgetall("wakaq:stats:default") == {b"done": b"2"})


def test_a_worker_that_is_silent_while_a_task_runs_is_reported_and_left_alone(
    start, redis, eventually
):
    worker = start(
        SINGLE
        + """
import ctypes
@wakaq.task
def hold(seconds):
    client.rpush("started", f"{os.getpid()} hold")
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))  # keeps the GIL
    client.rpush("done", f"{os.getpid()} hold")
"""
    )
    worker.app.hold.delay(2.5)
    ((pid, _),) = popped(redis, 1, "started")

    eventually(lambda: f"(pid {pid}) does not answer while it runs hold(2.5)" in worker.log)
    eventually(lambda: worker.titles()[worker.pid].endswith("1 workers, 1 busy, 1 silent"))
    assert popped(redis, 1) == [(pid, "hold")]
    worker.app.note.delay("next")
    assert popped(redis, 1) == [(pid, "next")]
    assert worker.log.count("does not answer") == 1


def test_a_supervisor_that_was_stopped_itself_blames_nobody(start, redis):
    worker = start(SINGLE)
    worker.app.nap.delay(0, "first")
    ((pid, _),) = popped(redis, 1)
    everybody = list(worker.titles())
    for one in everybody:
        os.kill(one, signal.SIGSTOP)
    # Longer than the silence that is allowed; nothing else can happen meanwhile.
    redis.blpop("nothing", timeout=2.5)
    for one in everybody:
        os.kill(one, signal.SIGCONT)
    worker.app.note.delay("next")

    assert popped(redis, 1) == [(pid, "next")]
    assert "does not answer" not in worker.log


def test_a_worker_that_does_not_exit_is_killed_after_a_grace(start, redis, eventually):
    worker = start(
        SINGLE.replace("wait_timeout", "max_tasks_per_worker=1, wait_timeout")
        + """
import threading
from wakaq.supervisor import supervisor
supervisor.EXIT_GRACE = 0.5

@wakaq.task
def leaves_a_thread():
    client.rpush("started", f"{os.getpid()} thread")
    threading.Thread(target=time.sleep, args=(3600,)).start()
"""
    )
    worker.app.leaves_a_thread.delay()
    ((pid, _),) = popped(redis, 1, "started")
    worker.app.note.delay("next")

    assert popped(redis, 1)[0][0] != pid
    eventually(lambda: "by us, because of: it did not exit" in worker.log)
    eventually(lambda: redis.hget("wakaq:stats:default", "done") == b"2")
