"""What becomes of tasks when their worker, or the supervisor, dies.

Every death here is a real one.
"""

import json
import os
import signal
import time

import psutil
import pytest

APP = """
import ctypes, os, time
import redis
from wakaq import WakaQ
client = redis.Redis.from_url(os.environ["REDIS_URL"])
wakaq = WakaQ(queues=[(0, "high"), (1, "low")], concurrency=1, url=os.environ["REDIS_URL"],
    wait_timeout=0.2)

@wakaq.task
def nap(seconds, name):
    client.rpush("started", f"{os.getpid()} {name}")
    time.sleep(seconds)
    client.rpush("done", name)

@wakaq.task
def die(how):
    client.rpush("started", f"{os.getpid()} {how}")
    if how == "exit":
        os._exit(7)
    elif how == "segfault":
        ctypes.string_at(0)
    else:
        os.kill(os.getpid(), 9)
"""
FOUR = APP.replace("concurrency=1", "concurrency=4, max_redeliveries=50")


def popped(redis, count, key="done", within=10):
    found = []
    for _ in range(count):
        element = redis.blpop(key, timeout=within)
        assert element, f"only {len(found)} of {count} came: {found}"
        found.append(element[1].decode())
    return found


def started(redis):
    """Return the pid of the worker of the next task that starts."""
    return int(popped(redis, 1, "started")[0].split()[0])


def assert_all_settled(redis):
    assert redis.keys("wakaq:inflight:*") == []
    assert redis.hgetall("wakaq:registry:workers") == {}
    assert redis.hgetall("wakaq:registry:turns") == {}


@pytest.mark.timeout(40)
def test_every_task_runs_while_a_worker_is_killed_every_300_ms(start, redis, eventually):
    worker = start(FOUR)
    worker.workers(4)
    with worker.app.wakaq.batch():
        for number in range(200):
            worker.app.nap.delay(0.05, number)
    kills = 0
    done = set()
    next_kill = time.monotonic() + 0.3
    while len(done) < 200:
        element = redis.blpop("done", timeout=0.1)
        if element:
            done.add(int(element[1]))
        if time.monotonic() >= next_kill and len(done) < 200:
            next_kill += 0.3
            os.kill(worker.workers(1)[kills % 2], signal.SIGKILL)
            kills += 1
    eventually(lambda: int(redis.hget("wakaq:stats:low", "done") or 0) == 200)
    statistics = redis.hgetall("wakaq:stats:low")
    starts = redis.llen("started")

    assert worker.stop() == 0
    assert kills >= 5
    assert redis.llen("wakaq:dead:low") == 0
    # Each kill repeats at most the one task that its worker was running.
    assert starts <= 200 + kills
    assert int(statistics.get(b"redelivered", 0)) <= kills
    assert_all_settled(redis)


@pytest.mark.parametrize("how", ["exit", "segfault", "kill"])
def test_a_task_that_takes_its_worker_down_is_redelivered_and_then_dead(
    start, redis, eventually, how
):
    worker = start(APP.replace("concurrency=1", "concurrency=1, max_redeliveries=1"))
    worker.app.die.delay(how)
    worker.app.nap.delay(0, "next")

    assert popped(redis, 1) == ["next"]
    letter = json.loads(redis.lindex("wakaq:dead:low", 0))
    assert letter["reason"] == "redelivered too often"
    payload = json.loads(letter["payload"])
    assert payload == {"name": "die", "args": [how], "kwargs": {}, "redelivered": 1}
    assert len(redis.lrange("started", 0, -1)) == 3
    cause = {
        "exit": "exited with status 7",
        "segfault": "was killed by SIGSEGV",
        "kill": "was killed by SIGKILL",
    }[how]
    eventually(lambda: worker.log.count(f"{cause} after") == 2)
    assert f"while it ran die('{how}')" in worker.log
    assert worker.stop() == 0
    assert_all_settled(redis)


def test_with_no_redeliveries_the_first_death_is_the_last(start, redis, eventually):
    worker = start(APP.replace("concurrency=1", "concurrency=1, max_redeliveries=0"))
    worker.app.die.delay("exit")

    eventually(lambda: redis.llen("wakaq:dead:low") == 1)
    assert redis.llen("started") == 1


def test_what_a_dead_worker_had_not_started_runs_in_its_order(start, redis):
    worker = start(APP)
    # Many at a time are assigned once tasks are known to be short.
    with worker.app.wakaq.batch():
        for number in range(300):
            worker.app.nap.delay(0, f"{number}")
        worker.app.die.delay("kill")
        for number in range(300, 600):
            worker.app.nap.delay(0, f"{number}")

    # The die task is a dead letter after its fourth death, and nothing of the rest was passed over
    # or doubled.
    assert popped(redis, 600) == [str(number) for number in range(600)]
    assert redis.llen("done") == 0


def test_the_more_urgent_task_comes_first_also_after_a_death(start, redis):
    worker = start(APP.replace("concurrency=1", "concurrency=1, max_redeliveries=0"))
    for number in range(3):
        worker.app.nap.delay(30, "held")
        pid = started(redis)
        # The first of them gets to Redis while nobody is idle, so a watcher may hold it back for a
        # moment.
        worker.app.nap.delay(0, f"low {number}")
        worker.app.nap.delay(0, f"high {number}", queue="high")
        os.kill(pid, signal.SIGKILL)

        assert popped(redis, 2) == [f"high {number}", f"low {number}"]
        redis.delete("started")


def test_workers_end_and_finish_their_task_when_their_supervisor_is_killed(
    start, redis, eventually
):
    worker = start(APP.replace("concurrency=1", "concurrency=2"))
    for name in ("one", "two", "waits"):
        worker.app.nap.delay(1, name)
    popped(redis, 2, "started")
    worker.process.kill()
    worker.wait()

    assert sorted(popped(redis, 2)) == ["one", "two"]
    ended = time.monotonic()
    eventually(lambda: not worker.processes(), within=2)
    assert time.monotonic() - ended < 2
    # The tasks that ran are acked; the third one, never started, is in its queue or was never taken
    # from it.
    assert redis.llen("wakaq:low") == 1
    assert redis.keys("wakaq:inflight:*") == []
    assert redis.hget("wakaq:stats:low", "done") == b"2"


def test_idle_workers_end_at_once_when_their_supervisor_is_killed(start, redis, eventually):
    worker = start(APP)
    worker.app.nap.delay(0, "one")
    popped(redis, 1)
    worker.process.kill()
    worker.wait()

    eventually(lambda: not worker.processes(), within=2)


def test_a_killed_fork_server_is_replaced(start, redis, eventually):
    worker = start(APP.replace("concurrency=1", "concurrency=2"))
    pids = worker.workers(2)
    (server,) = [pid for pid, title in worker.titles().items() if title.endswith("fork server")]
    os.kill(server, signal.SIGKILL)
    os.kill(pids[0], signal.SIGKILL)

    def has_new_worker():
        assert len(set(worker.workers(2)) - set(pids)) == 1

    eventually(has_new_worker, within=8)
    worker.app.nap.delay(0, "one")
    assert popped(redis, 1) == ["one"]
    assert worker.stop() == 0


def test_no_zombie_is_left_by_dead_workers(start, redis):
    worker = start(APP)
    for _ in range(3):
        worker.app.nap.delay(0, "one")
        pid = started(redis)
        os.kill(pid, signal.SIGKILL)
    worker.app.nap.delay(0, "last")
    while popped(redis, 1) != ["last"]:
        pass

    zombies = [
        child
        for child in psutil.Process(worker.pid).children(recursive=True)
        if child.status() == psutil.STATUS_ZOMBIE
    ]
    assert zombies == []


def test_a_subprocess_of_a_task_does_not_outlive_its_crash(start, redis, eventually):
    worker = start(
        APP
        + """
import subprocess
@wakaq.task
def fork():
    client.rpush("child", subprocess.Popen(["sleep", "3600"]).pid)
    os._exit(1)
"""
    )
    worker.app.fork.delay()
    pid = int(popped(redis, 1, "child")[0])

    eventually(lambda: not psutil.pid_exists(pid))


@pytest.mark.parametrize(
    ("place", "what"),
    [("supervisor.Supervisor", "The supervisor"), ("dispatcher.Dispatcher", "The dispatcher")],
)
def test_a_supervisor_that_meets_a_bug_of_its_own_exits_and_its_tasks_end(
    start, redis, eventually, place, what
):
    module, name = place.split(".")
    bug = f"""
import sys
from wakaq.supervisor.{module} import {name}
step = {name}._step

def broken(self):
    if client.exists("bug"):
        raise RuntimeError("a bug")
    step(self)

if sys.argv[1:2] == ["worker"]:  # and not in the test
    {name}._step = broken
"""
    worker = start(APP + bug)
    worker.app.nap.delay(3.0, "a")  # longer than the supervisor sleeps
    started(redis)
    redis.set("bug", 1)

    assert worker.wait() == 4
    assert f"{what} failed: this is a bug in WakaQ" in worker.log
    assert popped(redis, 1) == ["a"]
    eventually(lambda: redis.keys("wakaq:inflight:*") == [])


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs pidfd_open")
def test_a_worker_that_the_supervisor_cannot_hold_is_ended_and_leaves_no_descriptor(
    start, redis, eventually
):
    def descriptors(source):
        worker = start(source)
        worker.app.nap.delay(0, "a")
        popped(redis, 1)
        assert len(worker.workers()) == 1
        watching = "blmove"  # both queues: all connections are there
        eventually(lambda: [c["cmd"] for c in redis.client_list()].count(watching) == 2)
        found = psutil.Process(worker.pid).num_fds()
        assert worker.stop() == 0
        return found, worker.log

    usual, _ = descriptors(APP)
    failing = """
import sys
real, calls = os.pidfd_open, []

def pidfd_open(pid):
    calls.append(pid)
    if len(calls) == 1:
        raise OSError(24, "Too many open files")
    return real(pid)

if sys.argv[1:2] == ["worker"]:  # and not in the test
    os.pidfd_open = pidfd_open
"""
    found, log = descriptors(APP + failing)

    assert "Worker 1 cannot be forked, trying again" in log
    assert found == usual


def test_a_registry_that_somebody_has_overwritten_makes_no_bug_of_a_stop(start, redis):
    worker = start(APP)
    worker.app.nap.delay(0, "a")
    assert popped(redis, 1) == ["a"]
    redis.delete("wakaq:registry:workers")
    redis.set("wakaq:registry:workers", "no hash")

    assert worker.stop() == 0
    assert "Others will have to forget this supervisor: " in worker.log
    assert "WRONGTYPE" in worker.log
