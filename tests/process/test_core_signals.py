"""Signals to the supervisor: draining, deadlines for it, ending at once, and looking inside."""

import os
import signal
import time

import pytest

APP = """
import os, time
import redis
from wakaq import WakaQ
client = redis.Redis.from_url(os.environ["REDIS_URL"])
wakaq = WakaQ(queues=["default"], concurrency=2, url=os.environ["REDIS_URL"], wait_timeout=0.2)

@wakaq.task
def nap(seconds, name):
    client.rpush("started", name)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.01)
    client.rpush("done", name)
"""


def popped(redis, count, key="done", within=10):
    found = []
    for _ in range(count):
        element = redis.blpop(key, timeout=within)
        assert element, f"only {len(found)} of {count} came: {found}"
        found.append(element[1].decode())
    return found


def waiting(redis):
    return redis.lrange("wakaq:default", 0, -1)


def assert_all_settled(redis):
    assert redis.keys("wakaq:inflight:*") == []
    assert redis.hgetall("wakaq:registry:workers") == {}
    assert redis.hgetall("wakaq:registry:turns") == {}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_runs_may_finish_and_what_waits_stays(start, redis, number):
    worker = start(APP)
    for name in ("one", "two", "three", "four"):
        worker.app.nap.delay(0.5, name)
    popped(redis, 2, "started")

    assert worker.stop(number) == 0
    assert sorted(popped(redis, 2)) == ["one", "two"]
    assert [b'"three"' in payload for payload in waiting(redis)] == [True, False]
    assert len(waiting(redis)) == 2
    assert redis.hgetall("wakaq:stats:default") == {b"done": b"2"}
    assert_all_settled(redis)


def test_short_tasks_that_were_assigned_ahead_go_back_in_their_order(start, redis):
    worker = start(APP.replace("concurrency=2", "concurrency=1"))
    with worker.app.wakaq.batch():
        for number in range(5_000):
            worker.app.nap.delay(0, number)
    popped(redis, 300)

    assert worker.stop() == 0
    done = 300 + redis.llen("done")
    assert done + len(waiting(redis)) == 5_000
    assert redis.hget("wakaq:stats:default", "done") == str(done).encode()
    assert [f"[0, {number}]".encode() in p for number, p in enumerate(waiting(redis), done)] == [
        True
    ] * (5_000 - done)
    assert_all_settled(redis)


@pytest.mark.parametrize(
    "numbers",
    [(signal.SIGQUIT,), (signal.SIGTERM, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)],
)
def test_ending_at_once_puts_what_runs_back_uncounted(start, redis, eventually, numbers):
    worker = start(APP)
    worker.app.nap.delay(60, "one")
    worker.app.nap.delay(60, "two")
    popped(redis, 2, "started")
    for number in numbers[:-1]:
        worker.process.send_signal(number)
        eventually(lambda: "stopping after the running tasks" in worker.log)

    began = time.monotonic()
    assert worker.stop(numbers[-1]) == 0
    assert time.monotonic() - began < 2
    after = sorted(waiting(redis))
    assert len(after) == 2
    assert b"redelivered" not in b"".join(after)
    assert "stopping at once" in worker.log
    assert_all_settled(redis)


def test_tasks_may_go_on_for_the_shutdown_timeout(start, redis):
    worker = start(APP.replace("wait_timeout", "shutdown_timeout=0.7, wait_timeout"))
    worker.app.nap.delay(0.3, "short")
    worker.app.nap.delay(60, "long")
    popped(redis, 2, "started")

    began = time.monotonic()
    assert worker.stop() == 0
    assert 0.6 < time.monotonic() - began < 2.5
    assert popped(redis, 1) == ["short"]
    assert [b'"long"' in payload for payload in waiting(redis)] == [True]
    assert_all_settled(redis)


def test_a_signal_before_the_workers_are_there_stops_as_well(start, redis, eventually):
    worker = start(APP)
    eventually(lambda: "Started with 2 workers" in worker.log)

    assert worker.stop() == 0
    assert_all_settled(redis)


def test_workers_ignore_signals_meant_for_a_whole_terminal_or_container(start, redis):
    worker = start(APP)
    worker.app.nap.delay(0.5, "one")
    popped(redis, 1, "started")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        for pid in worker.titles():
            if pid != worker.pid:
                os.kill(pid, number)

    assert popped(redis, 1) == ["one"]
    assert "Traceback" not in worker.log


def test_sigusr1_shows_every_workers_stacks_and_ends_nothing(start, redis, eventually):
    worker = start(APP)
    worker.app.nap.delay(1, "one")
    popped(redis, 1, "started")
    pids = worker.workers(2)
    worker.process.send_signal(signal.SIGUSR1)

    eventually(lambda: worker.log.count("Stacks of Worker") == 2)
    assert "in nap" in worker.log
    assert popped(redis, 1) == ["one"]
    assert worker.workers(2) == pids


def test_sigusr1_shows_the_stacks_of_now_however_often(start, redis, eventually):
    worker = start(APP)
    worker.app.nap.delay(15, "one")
    popped(redis, 1, "started")
    worker.workers(2)
    for times in range(1, 4):
        worker.process.send_signal(signal.SIGUSR1)
        eventually(lambda times=times: worker.log.count("Stacks of Worker") == 2 * times)

    # Each time from the beginning of the file, and nothing of what was there before.
    assert worker.log.count("in nap") == 3
    assert "\0" not in worker.log
