"""Retries at every level of precedence, their delays, and the dead letters at their end."""

import itertools
import json

import pytest

from wakaq.store.dead_letter import DeadLetter

APP = """
import os, time
from datetime import timedelta
import redis
from wakaq import Queue, SoftTimeout, WakaQ
client = redis.Redis.from_url(os.environ["REDIS_URL"])
wakaq = WakaQ(
    queues=[Queue("default" {queue})], concurrency=1, url=os.environ["REDIS_URL"],
    wait_timeout=0.2 {app}
)

@wakaq.task({task})
def fails(*args, **kwargs):
    client.rpush("tries", time.time())
    raise ValueError("no luck")

@wakaq.task
def note(*args, **kwargs):
    client.rpush("done", repr((args, kwargs)))
"""


def source(app="", queue="", task=""):
    return APP.format(app=app and ", " + app, queue=queue and ", " + queue, task=task)


def letters_of(redis, eventually, count=1):
    """Return the dead letters, oldest first, once they are there."""

    def has_letters():
        assert redis.llen("wakaq:dead:default") == count

    eventually(has_letters, within=10)
    return [json.loads(letter) for letter in redis.lrange("wakaq:dead:default", 0, -1)[::-1]]


@pytest.mark.parametrize(
    ("levels", "tries"),
    [
        (("", "", ""), 1),
        (("max_retries=2", "", ""), 3),
        (("max_retries=2", "max_retries=1", ""), 2),
        (("max_retries=2", "max_retries=0", ""), 1),
        (("max_retries=2", "max_retries=1", "max_retries=4"), 5),
        (("max_retries=2", "max_retries=1", "max_retries=0"), 1),
        (("max_retries=0", "", "max_retries=1"), 2),
    ],
)
def test_retries_are_exact_by_task_then_queue_then_app(start, redis, eventually, levels, tries):
    app, queue, task = levels
    worker = start(source(app + ", retry_on=ValueError" if app else "", queue, task))
    worker.app.fails.delay(1, two=[])
    (letter,) = letters_of(redis, eventually)
    expected = {"name": "fails", "args": [1], "kwargs": {"two": []}}

    assert redis.llen("tries") == tries
    assert letter["reason"] == "raised"
    assert "ValueError: no luck" in letter["traceback"]
    assert json.loads(letter["payload"]) == expected | ({"retry": tries - 1} if tries > 1 else {})
    assert redis.hget("wakaq:stats:default", "retried") == (
        str(tries - 1).encode() if tries > 1 else None
    )


@pytest.mark.parametrize(
    ("levels", "tries"),
    [
        (("retry_on=ValueError", "", ""), 3),
        (("retry_on=LookupError", "retry_on=(KeyError, ValueError)", ""), 3),
        (("retry_on=ValueError", "", "retry_on=SoftTimeout"), 1),
        (("retry_on=()", "", ""), 1),
        (("", "", "retry_on=Exception"), 3),
        (("", "", ""), 1),
    ],
)
def test_only_what_retry_on_names_is_retried(start, redis, eventually, levels, tries):
    app, queue, task = levels
    worker = start(source("max_retries=2" + (app and ", " + app), queue, task))
    worker.app.fails.delay()
    letters_of(redis, eventually)

    assert redis.llen("tries") == tries


@pytest.mark.parametrize(
    ("delay", "gaps"),
    [
        ("0.3", [0.3, 0.3]),
        ("timedelta(seconds=0.3)", [0.3, 0.3]),
        ("lambda retry: 0.2 * retry", [0.2, 0.4]),
        ("lambda retry: timedelta(seconds=0.2)", [0.2, 0.2]),
        ("lambda retry: 1 / 0", [0, 0]),
    ],
)
def test_a_retry_waits_for_its_delay(start, redis, eventually, delay, gaps):
    options = f"max_retries=2, retry_on=ValueError, retry_delay={delay}"
    worker = start(source(task=options))
    worker.app.fails.delay()
    letters_of(redis, eventually)
    tries = [float(moment) for moment in redis.lrange("tries", 0, -1)]
    actual = [later - earlier for earlier, later in itertools.pairwise(tries)]

    assert len(actual) == len(gaps)
    for gap, expected in zip(actual, gaps, strict=True):
        assert expected <= gap < expected + 0.2, actual


def test_equal_calls_that_wait_for_their_retry_stay_two(start, redis, eventually):
    worker = start(source(task="max_retries=1, retry_on=ValueError, retry_delay=0.3"))
    worker.app.fails.delay()
    worker.app.fails.delay()

    letters_of(redis, eventually, 2)
    assert redis.llen("tries") == 4


def test_a_retry_goes_to_the_end_of_its_queue(start, redis, eventually):
    worker = start(source(task="max_retries=1, retry_on=ValueError"))
    with worker.app.wakaq.batch():
        worker.app.fails.delay()
        for number in range(10):
            worker.app.note.delay(number)
    letters_of(redis, eventually)

    assert redis.llen("done") == 10
    assert "Task fails failed (raised), retry 1 of 1 in 0.0 s" in worker.log


@pytest.mark.parametrize(
    "error", ["SystemExit(3)", "KeyboardInterrupt()", "SoftTimeout('mine')", "BaseException()"]
)
def test_whatever_a_task_raises_is_only_its_own(start, redis, eventually, error):
    worker = start(source().replace('ValueError("no luck")', error))
    worker.app.fails.delay()
    worker.app.note.delay("next")

    assert redis.blpop("done", timeout=5)
    (letter,) = letters_of(redis, eventually)
    assert letter["reason"] == ("soft timeout" if "Soft" in error else "raised")
    assert worker.stop() == 0
    assert "exited with status 0" in worker.log


def test_what_the_task_does_to_its_arguments_does_not_reach_the_retry(start, redis, eventually):
    worker = start(
        source()
        + """
@wakaq.task(max_retries=1, retry_on=ValueError)
def spoils(names):
    client.rpush("seen", repr(names))
    names.append("more")
    raise ValueError("no")
"""
    )
    worker.app.spoils.delay([])
    letters_of(redis, eventually)

    assert redis.lrange("seen", 0, -1) == [b"[]", b"[]"]


@pytest.mark.parametrize(("kept", "expected"), [(2, [4, 3]), (0, [])])
def test_dead_letters_are_capped(start, redis, eventually, kept, expected):
    worker = start(source(app=f"dead_letters={kept}"))
    for number in range(5):
        worker.app.fails.delay(number)

    eventually(lambda: redis.hget("wakaq:stats:default", "dead") == b"5")
    letters = [json.loads(letter) for letter in redis.lrange("wakaq:dead:default", 0, -1)]
    assert [json.loads(letter["payload"])["args"][0] for letter in letters] == expected


def test_a_dead_letters_arguments_arrive_unchanged_when_it_is_retried(start, redis, eventually):
    worker = start(
        source()
        + """
@wakaq.task(max_retries=1, retry_on=ValueError)
def fails_at_first(*args, **kwargs):
    if not client.exists("healed"): raise ValueError("no")
    client.rpush("done", repr((args, kwargs)))
"""
    )
    app = worker.app
    from_there = ([1, 2**70, 0.1, "ü\0", None, {}], {"when": "now", "deep": {"er": [[]]}})
    app.fails_at_first.delay(*from_there[0], **from_there[1])
    (letter,) = letters_of(redis, eventually)
    assert DeadLetter.decode(json.dumps(letter).encode()).reason == "raised"
    redis.set("healed", 1)
    command = start(app, "dead retry", "--queue=default", "--yes")
    assert command.wait() == 0, command.log

    _, arrived = redis.blpop("done", timeout=5)
    assert arrived.decode() == repr((tuple(from_there[0]), from_there[1]))
    assert redis.llen("wakaq:dead:default") == 0
