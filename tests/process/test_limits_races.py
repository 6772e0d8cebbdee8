"""A soft timeout hits the task that it is meant for, and nothing else.

Not another task, no hook, not WakaQ's own code.
"""

import pytest

APP = """
import os, threading, time
import redis
from wakaq import SoftTimeout, WakaQ
client = redis.Redis.from_url(os.environ["REDIS_URL"])
wakaq = WakaQ(queues=["default"], concurrency=2, url=os.environ["REDIS_URL"], wait_timeout=0.2)

@wakaq.task
def short(number):
    try:
        sum(range(100))
    except SoftTimeout:
        client.rpush("hit", f"short {number}")
        raise
    client.incr("short")
"""


def popped(redis, count, key="done", within=10):
    found = []
    for _ in range(count):
        element = redis.blpop(key, timeout=within)
        assert element, f"only {len(found)} of {count} came: {found}"
        found.append(element[1].decode())
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_no_short_task_sees_the_soft_timeout_of_a_long_one(start, redis, eventually, workers):
    worker = start(
        APP.replace("concurrency=2", f"concurrency={workers}")
        + """
@wakaq.task(soft_timeout=0.2, max_retries=3)
def long():
    client.incr("long")
    time.sleep(60)
"""
    )
    with worker.app.wakaq.batch():
        for number in range(1_000):
            worker.app.short.delay(number)
            if number == 500:
                worker.app.long.delay()

    eventually(lambda: redis.llen("wakaq:dead:default") == 1, within=10)
    assert redis.get("short") == b"1000"
    assert redis.get("long") == b"4"
    assert redis.hgetall("wakaq:stats:default") == {
        b"done": b"1000",
        b"retried": b"3",
        b"dead": b"1",
    }
    assert redis.lrange("hit", 0, -1) == []
    assert worker.stop() == 0


# The worker signals itself, as the supervisor does, from a thread that has nothing else to do:
# thousands of times in each task's last microseconds. The limits are placed around the time that
# the task takes.
RACE = (
    APP
    + """
import signal

def hail():
    main = threading.main_thread().ident
    while True:
        time.sleep(0.00002)
        signal.pthread_kill(main, signal.SIGUSR2)

@wakaq.after_worker_started
def begin():
    threading.Thread(target=hail, daemon=True).start()

def spin(seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pass

# Hooks may take time, too: no signal may hit them.
@wakaq.before_task_started
def before():
    spin(0.0005)

@wakaq.after_task_finished
def after():
    try:
        spin(0.002)
    except SoftTimeout:
        client.rpush("hit", "hook")

@wakaq.task(soft_timeout=0.005)
def races(number):
    spin(0.0040 + 0.000002 * number)
"""
)


def test_a_signal_that_races_the_end_of_its_task_hits_it_or_nothing(start, redis, eventually):
    worker = start(RACE)
    with worker.app.wakaq.batch():
        for number in range(500):
            worker.app.races.delay(number)
            worker.app.short.delay(number)

    def all_ended():
        statistics = redis.hgetall("wakaq:stats:default")
        ended = int(statistics.get(b"done", 0)) + int(statistics.get(b"dead", 0))
        assert ended == 1_000, (statistics, worker.log)

    eventually(all_ended, within=15)
    dead = redis.llen("wakaq:dead:default")
    # Otherwise there was no race.
    assert 10 < dead < 490
    assert redis.get("short") == b"500"
    assert redis.lrange("hit", 0, -1) == []
    assert redis.hget("wakaq:stats:default", "done") == str(1_000 - dead).encode()
    # No worker died of a signal that hit its own code, or nothing.
    assert worker.stop() == 0
    assert worker.log.count("exited with status 0") == 2
    assert "was killed" not in worker.log
