"""Async tasks: how many run at once, beside sync ones, and how they end when their worker does."""

import json
import signal
import time

import pytest

APP = """
import asyncio, os, time
from wakaq import WakaQ

wakaq = WakaQ(
    queues=["high", "low"], url=os.environ["REDIS_URL"], wait_timeout=0.2, OPTIONS
)
client = wakaq.broker.client
now = most = 0

@wakaq.task
async def doze(seconds, name="doze"):
    global now, most
    now += 1
    most = max(most, now)
    client.rpush("started", name)
    await asyncio.sleep(seconds)
    now -= 1
    client.rpush("done", name)

@wakaq.task
async def count():
    client.rpush("most", most)

@wakaq.task
async def short(seconds):
    await asyncio.sleep(seconds)

@wakaq.task
async def timer(count):
    late = []
    for _ in range(count):
        began = time.monotonic()
        await asyncio.sleep(0.001)
        late.append(time.monotonic() - began - 0.001)
    client.rpush("late", sorted(late)[int(count * 0.99)])

@wakaq.task
async def spread(levels):
    await asyncio.gather(*(spread.adelay(levels - 1) for _ in range(2 if levels else 0)))
    client.rpush("done", levels)

@wakaq.task
def nap(seconds, name="nap"):
    client.rpush("started", name)
    time.sleep(seconds)
    client.rpush("done", name)

@wakaq.task
def compute(seconds):
    client.rpush("started", "compute")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))
    client.rpush("done", "compute")
"""


def app(options="concurrency=1"):
    return APP.replace("OPTIONS", options)


def take(redis, count, key="done", within=10):
    """Wait for the next `count` elements of a list."""
    found = []
    for _ in range(count):
        element = redis.blpop(key, timeout=within)
        assert element, f"only {len(found)} of {count} came: {found}"
        found.append(element[1].decode())
    return found


def assert_nothing_waits(redis):
    assert redis.keys("wakaq:inflight:*") == redis.keys("wakaq:eta:*") == []
    assert redis.llen("wakaq:high") == redis.llen("wakaq:low") == 0


@pytest.mark.parametrize(("limit", "tasks", "most"), [(10, 30, 10), (1, 3, 1), (0, 300, 300)])
def test_as_many_run_at_once_as_async_concurrency_says(start, redis, limit, tasks, most):
    worker = start(app(f"concurrency=1, async_concurrency={limit}"))
    with worker.app.wakaq.batch():
        for _ in range(tasks):
            worker.app.doze.delay(0.3 if limit else 1.5)
    take(redis, tasks)
    worker.app.count.delay()

    assert take(redis, 1, "most") == [str(most)]
    assert worker.stop() == 0
    assert_nothing_waits(redis)


def test_neither_kind_stalls_the_other(start, redis):
    worker = start(app())
    worker.app.nap.delay(1.5)
    take(redis, 1, "started")
    for _ in range(20):
        worker.app.doze.delay(0.2)
    worker.app.nap.delay(0, "second nap")

    assert take(redis, 22) == ["doze"] * 20 + ["nap", "second nap"]
    assert worker.stop() == 0


def test_a_worker_full_of_async_tasks_takes_sync_ones(start, redis):
    worker = start(app("concurrency=1, async_concurrency=2"))
    for _ in range(2):
        worker.app.doze.delay(2)
    take(redis, 2, "started")
    worker.app.nap.delay(0)

    assert take(redis, 3) == ["nap", "doze", "doze"]
    assert worker.stop() == 0


def test_a_worker_busy_with_a_sync_task_takes_async_ones_that_arrive_later(start, redis):
    worker = start(app("concurrency=2"))
    for _ in range(2):
        worker.app.nap.delay(1)
    take(redis, 2, "started")
    for _ in range(50):
        worker.app.doze.delay(0.1)

    assert take(redis, 52) == ["doze"] * 50 + ["nap", "nap"]
    assert worker.stop() == 0


def test_two_workers_share_what_waits(start, redis):
    worker = start(app("concurrency=2, async_concurrency=100"))
    worker.workers(2)
    began = time.monotonic()
    with worker.app.wakaq.batch():
        for _ in range(2_000):
            worker.app.short.delay(0.1)

    def is_done():
        return int(redis.hget("wakaq:stats:low", "done") or 0) == 2_000

    while not is_done():
        assert time.monotonic() - began < 4, "ideal is 1 s; see the benchmarks"
        time.sleep(0.01)
    assert worker.stop() == 0
    assert_nothing_waits(redis)


def test_a_sync_task_that_computes_leaves_async_ones_their_turns(start, redis):
    worker = start(app())
    worker.workers()
    worker.app.compute.delay(3)
    take(redis, 1, "started")
    worker.app.timer.delay(200)

    assert float(take(redis, 1, "late")[0]) < 0.1
    assert redis.llen("done") == 0, "it was to be computing all the time"
    assert worker.stop() == 0


def test_shutdown_waits_for_what_runs_and_puts_back_the_rest(start, redis):
    worker = start(app("concurrency=1, async_concurrency=5"))
    with worker.app.wakaq.batch():
        for number in range(10):
            worker.app.doze.delay(0.7, str(number))
    started = take(redis, 5, "started")

    assert worker.stop() == 0
    assert sorted(take(redis, 5)) == sorted(started)
    waiting = [json.loads(payload)["args"][1] for payload in redis.lrange("wakaq:low", 0, -1)]
    assert waiting == [str(number) for number in range(5, 10)]
    assert redis.keys("wakaq:inflight:*") == []


def test_after_the_shutdown_timeout_what_runs_is_put_back_uncounted(start, redis):
    worker = start(app("concurrency=1, shutdown_timeout=0.3"))
    for number in range(3):
        worker.app.doze.delay(30, str(number))
    take(redis, 3, "started")

    assert worker.stop() == 0
    payloads = [json.loads(payload) for payload in redis.lrange("wakaq:low", 0, -1)]
    assert sorted(payload["args"][1] for payload in payloads) == ["0", "1", "2"]
    assert not any(payload.keys() & {"retry", "redelivered"} for payload in payloads)


def test_a_worker_that_has_had_its_number_of_tasks_waits_for_those_that_run(
    start, redis, eventually
):
    worker = start(app("concurrency=1, max_tasks_per_worker=5"))
    with worker.app.wakaq.batch():
        for number in range(12):
            worker.app.doze.delay(0.5, str(number))

    assert sorted(take(redis, 12), key=int) == [str(number) for number in range(12)]
    eventually(lambda: worker.log.count("exited with status 0") == 2)
    assert worker.stop() == 0
    assert redis.llen("done") == 0
    assert_nothing_waits(redis)


def test_what_ran_in_a_worker_that_was_killed_runs_again(start, redis):
    worker = start(app())
    for number in range(20):
        worker.app.doze.delay(0.5, str(number))
    take(redis, 20, "started")
    (pid,) = worker.workers()
    before = redis.hget("wakaq:stats:low", "redelivered")

    next(process for process in worker.processes() if process.pid == pid).kill()

    assert before is None
    assert sorted(take(redis, 20), key=int) == [str(number) for number in range(20)]
    assert worker.stop() == 0
    assert redis.hget("wakaq:stats:low", "redelivered") == b"20"
    assert_nothing_waits(redis)


def test_what_runs_when_the_supervisor_is_killed_ends_and_is_acked(start, redis, eventually):
    worker = start(app())
    for number in range(20):
        worker.app.doze.delay(1, str(number))
    take(redis, 20, "started")
    worker.process.send_signal(signal.SIGKILL)
    worker.wait()

    take(redis, 20)
    eventually(lambda: not worker.titles())
    assert_nothing_waits(redis)
    assert redis.hget("wakaq:stats:low", "done") == b"20"
    assert redis.llen("started") == 0


def test_async_tasks_enqueue_with_adelay(start, redis):
    worker = start(app("concurrency=2"))
    worker.app.spread.delay(5)

    found = take(redis, 63)
    assert [found.count(str(level)) for level in range(5, -1, -1)] == [1, 2, 4, 8, 16, 32]
    assert worker.stop() == 0
    assert_nothing_waits(redis)


def test_titles_and_info_say_what_runs(start, redis, eventually):
    worker = start(app())
    (pid,) = worker.workers()
    worker.app.doze.delay(30)
    eventually(lambda: worker.titles()[pid] == "wakaq-worker: worker 1 running doze")
    worker.app.doze.delay(30)
    worker.app.nap.delay(30)
    eventually(lambda: worker.titles()[pid] == "wakaq-worker: worker 1 running nap and 2 more")

    def has_info():
        (entry,) = map(json.loads, redis.hvals("wakaq:registry:workers"))
        (child,) = entry["children"]
        assert sorted(task["name"] for task in child["tasks"]) == [
            "doze(30)",
            "doze(30)",
            "nap(30)",
        ]
        assert all(0 < task["seconds"] < 20 for task in child["tasks"])

    eventually(has_info)
    assert worker.stop(signal.SIGQUIT) == 0


def test_the_title_says_idle_when_the_last_one_has_ended(start, redis, eventually):
    worker = start(app())
    (pid,) = worker.workers()
    worker.app.doze.delay(0.1)
    take(redis, 1)

    eventually(lambda: worker.titles()[pid] == "wakaq-worker: worker 1 idle")
    assert worker.stop() == 0


def test_a_payload_with_two_names_is_no_message_and_holds_nothing_up(start, redis, eventually):
    worker = start(app("concurrency=1, async_concurrency=1"))
    redis.rpush("wakaq:low", b'{"name": "doze", "args": [0], "kwargs": {}, "name": "nap"}')
    worker.app.doze.delay(0)

    assert take(redis, 1) == ["doze"]
    eventually(lambda: redis.llen("wakaq:dead:low") == 1)
    assert json.loads(redis.lindex("wakaq:dead:low", 0))["reason"] == "not a message"
    assert worker.stop() == 0
