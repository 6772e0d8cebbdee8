"""Timeouts, retries and dead letters of async tasks.

Each for exactly the task that it is meant for.
"""

import json
import re
from collections import Counter

import pytest

APP = """
import asyncio, os, sys, time
from wakaq import Queue, SoftTimeout, WakaQ

wakaq = WakaQ(
    queues=["default"], url=os.environ["REDIS_URL"], wait_timeout=0.2, concurrency=1, max_retries=1
)
client = wakaq.broker.client

@wakaq.task(soft_timeout=0.3)
async def dawdle(name):
    client.rpush("started", name)
    try:
        await asyncio.sleep(30)
    except BaseException as error:
        client.rpush("seen", type(error).__name__)
        raise

@wakaq.task(soft_timeout=0.3)
async def convert():
    client.rpush("started", "convert")
    try:
        await asyncio.sleep(30)
    except asyncio.CancelledError as error:
        raise ConnectionError("the library gave up") from error

@wakaq.task(soft_timeout=0.3)
async def stubborn(seconds):
    try:
        await asyncio.sleep(30)
    except asyncio.CancelledError:
        client.rpush("seen", "swallowed")
    await asyncio.sleep(seconds)
    client.rpush("done", "stubborn")

@wakaq.task(soft_timeout=0.3)
async def fails_later():
    try:
        await asyncio.sleep(30)
    except asyncio.CancelledError:
        pass
    raise ValueError("for a reason of its own")

@wakaq.task(soft_timeout=0.2, hard_timeout=0.8)
async def deaf():
    client.rpush("started", "deaf")
    while True:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            client.rpush("seen", "swallowed")

@wakaq.task(hard_timeout=0.5)
async def blocks():
    client.rpush("started", "blocks")
    time.sleep(30)

@wakaq.task
async def doze(seconds, name="doze"):
    client.rpush("started", name)
    await asyncio.sleep(seconds)
    client.rpush("done", name)

@wakaq.task(hard_timeout=0.5)
def prompt():
    client.rpush("done", "prompt")

@wakaq.task
async def own_timeout():
    async with asyncio.timeout(0.05):
        await asyncio.sleep(30)

@wakaq.task
async def cancels_itself():
    asyncio.current_task().cancel()
    await asyncio.sleep(30)

@wakaq.task
async def exits(how):
    if how == "here":
        sys.exit("over")
    async def part():
        sys.exit("over")
    await asyncio.create_task(part())

@wakaq.task
async def stops_the_loop():
    asyncio.get_running_loop().stop()

@wakaq.task(retry_on=ConnectionError, max_retries=2, retry_delay=0.3)
async def refused():
    client.rpush("tries", repr(time.monotonic()))
    raise ConnectionError

def slow(limit):
    async def task(number, is_slow):
        client.hincrby("tries", number, 1)
        await asyncio.sleep(30 if is_slow else 0.05 + number % 7 / 100)
        client.hincrby("ends", number, 1)
    task.__name__ = f"slow_{limit}"
    return wakaq.task(soft_timeout=0.5 + limit / 10, max_retries=limit)(task)

slow_ones = [slow(limit) for limit in range(4)]
"""


def take(redis, count, key="done", within=10):
    """Wait for the next `count` elements of a list."""
    found = []
    for _ in range(count):
        element = redis.blpop(key, timeout=within)
        assert element, f"only {len(found)} of {count} came: {found}"
        found.append(element[1].decode())
    return found


@pytest.fixture
def letters(redis, eventually):
    """Return a function that waits for so many dead letters, and returns them, the oldest first."""

    def read(count):
        eventually(lambda: redis.llen("wakaq:dead:default") >= count, within=10)
        found = [json.loads(letter) for letter in redis.lrange("wakaq:dead:default", 0, -1)]
        assert len(found) == count
        return found[::-1]

    return read


def stats(redis):
    return {key.decode(): int(n) for key, n in redis.hgetall("wakaq:stats:default").items()}


def test_a_soft_timeout_cancels_the_one_task_which_is_retried_and_then_dead(start, redis, letters):
    worker = start(APP)
    worker.app.doze.delay(1.5)
    worker.app.dawdle.delay("x")

    (letter,) = letters(1)
    assert letter["reason"] == "soft timeout"
    assert json.loads(letter["payload"])["retry"] == 1
    assert "await asyncio.sleep(30)" in letter["traceback"]
    assert re.search(r"SoftTimeout: the task ran into its soft timeout\n$", letter["traceback"])
    assert take(redis, 2, "seen") == ["CancelledError"] * 2
    assert sorted(take(redis, 3, "started")) == ["doze", "x", "x"]
    assert take(redis, 1) == ["doze"]
    assert worker.stop() == 0
    assert stats(redis) == {"retried": 1, "dead": 1, "done": 1}


def test_an_error_that_the_cancellation_became_is_still_a_soft_timeout(start, redis, letters):
    worker = start(APP)
    worker.app.convert.delay()

    (letter,) = letters(1)
    assert letter["reason"] == "soft timeout"
    assert "ConnectionError: the library gave up" in letter["traceback"]
    assert redis.llen("started") == 2
    assert worker.stop() == 0


def test_a_task_that_swallows_the_cancellation_and_returns_is_done(start, redis):
    worker = start(APP)
    worker.app.stubborn.delay(0.5)

    assert take(redis, 1) == ["stubborn"]
    assert worker.stop() == 0
    assert redis.lrange("seen", 0, -1) == [b"swallowed"]
    assert stats(redis) == {"done": 1}


def test_a_task_that_swallows_the_cancellation_and_fails_has_failed_by_itself(
    start, redis, letters
):
    worker = start(APP)
    worker.app.fails_later.delay()

    (letter,) = letters(1)
    assert letter["reason"] == "raised"
    assert worker.stop() == 0
    assert stats(redis) == {"dead": 1}


@pytest.mark.parametrize("task", ["deaf", "blocks"])
def test_a_hard_timeout_is_for_one_task_and_the_others_run_again_uncounted(
    start, redis, letters, task
):
    worker = start(APP)
    for number in range(10):
        worker.app.doze.delay(1.5, str(number))
    take(redis, 10, "started")
    getattr(worker.app, task).delay()

    (letter,) = letters(1)
    assert letter["reason"] == "hard timeout"
    assert json.loads(letter["payload"])["name"] == task
    assert take(redis, 1, "started") == [task]
    assert sorted(take(redis, 10)) == [str(number) for number in range(10)]
    assert worker.stop() == 0
    assert stats(redis) == {"dead": 1, "done": 10}
    assert redis.llen("done") == 0
    assert redis.keys("wakaq:inflight:*") == []


def test_the_limit_of_a_sync_task_that_has_ended_hits_no_other(start, redis):
    worker = start(APP)
    worker.app.prompt.delay()
    take(redis, 1)
    worker.app.doze.delay(1.0)

    assert take(redis, 1) == ["doze"]
    assert worker.stop() == 0
    assert stats(redis) == {"done": 2}


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (["own_timeout"], "TimeoutError"),
        (["cancels_itself"], "CancelledError"),
        (["exits", "here"], "SystemExit: over"),
        (["exits", "in a part"], "SystemExit: over"),
    ],
)
def test_what_a_task_raises_is_its_own_and_the_loop_goes_on(start, redis, letters, call, error):
    worker = start(APP)
    (pid,) = worker.workers()
    worker.app.doze.delay(0.5)
    take(redis, 1, "started")
    name, *args = call
    getattr(worker.app, name).delay(*args)

    (letter,) = letters(1)
    assert letter["reason"] == "raised"
    assert error in letter["traceback"]
    worker.app.doze.delay(0)
    assert take(redis, 2) == ["doze", "doze"]
    assert worker.workers() == [pid]
    assert worker.stop() == 0


def test_a_loop_that_a_task_stops_goes_on(start, redis):
    worker = start(APP)
    worker.app.stops_the_loop.delay()
    worker.app.doze.delay(0)

    assert take(redis, 1) == ["doze"]
    assert worker.stop() == 0
    assert stats(redis) == {"done": 2}


def test_other_errors_are_retried_after_their_delay(start, redis, letters):
    worker = start(APP)
    worker.app.refused.delay()

    (letter,) = letters(1)
    assert letter["reason"] == "raised"
    first, second, third = map(float, take(redis, 3, "tries"))
    assert 0.3 <= second - first < 2
    assert 0.3 <= third - second < 2
    assert worker.stop() == 0
    assert stats(redis) == {"retried": 2, "dead": 1}


def test_of_five_hundred_each_has_its_own_count_of_retries(start, redis, letters):
    worker = start(APP.replace("concurrency=1", "concurrency=2"))
    worker.workers(2)
    slow = {number for number in range(500) if number % 3 == 0}
    with worker.app.wakaq.batch():
        for number in range(500):
            worker.app.slow_ones[number % 4].delay(number, number in slow)

    dead = [json.loads(letter["payload"]) for letter in letters(len(slow))]
    assert worker.stop() == 0
    assert {payload["args"][0]: payload.get("retry", 0) for payload in dead} == {
        number: number % 4 for number in slow
    }
    tries = {int(key): int(count) for key, count in redis.hgetall("tries").items()}
    assert tries == {n: 1 + n % 4 if n in slow else 1 for n in range(500)}
    ends = {int(key): int(count) for key, count in redis.hgetall("ends").items()}
    assert ends == dict.fromkeys(set(range(500)) - slow, 1)
    retried = sum(count - 1 for count in Counter(tries).values())
    assert stats(redis) == {"done": 500 - len(slow), "dead": len(slow), "retried": retried}
