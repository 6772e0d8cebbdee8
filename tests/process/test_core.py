"""From `.delay()` to a finished task.

Order, priorities, recall, logs and titles, by the real command.
"""

import json
import time
from pathlib import Path

import pytest

HEAD = """
import os, time
import redis
from wakaq import Queue, SoftTimeout, WakaQ
client = redis.Redis.from_url(os.environ["REDIS_URL"])
"""
APP = (
    HEAD
    + """
wakaq = WakaQ(queues=[(0, "high"), (1, "low")], concurrency=2, url=os.environ["REDIS_URL"],
wait_timeout=0.2)

@wakaq.task
def note(*args, **kwargs):
    client.rpush("done", repr((args, kwargs)))

@wakaq.task
def nap(seconds, name):
    client.rpush("started", name)
    time.sleep(seconds)
    client.rpush("done", name)
"""
)
SINGLE = APP.replace("concurrency=2", "concurrency=1")


def popped(redis, count, key="done", within=10):
    """Return the next `count` elements of a list, waiting for them."""
    found = []
    for _ in range(count):
        element = redis.blpop(key, timeout=within)
        assert element, f"only {len(found)} of {count} came"
        found.append(element[1].decode())
    return found


def assert_all_settled(redis):
    assert redis.keys("wakaq:inflight:*") == []
    assert redis.hgetall("wakaq:registry:workers") == {}
    assert redis.hgetall("wakaq:registry:turns") == {}


def test_a_task_gets_its_arguments_and_its_return_is_acked(start, redis, eventually):
    worker = start(APP)
    worker.app.note.delay(1, "two", three=[3, None])

    assert popped(redis, 1) == ["((1, 'two'), {'three': [3, None]})"]
    eventually(lambda: redis.hget("wakaq:stats:low", "done") == b"1")
    assert worker.stop() == 0
    assert_all_settled(redis)
    assert set(redis.keys()) == {b"wakaq:stats:low"}


def test_the_application_of_the_documentation_runs_ten_thousand_mixed_tasks(
    start, redis, eventually
):
    source = Path(__file__).parents[1].joinpath("unit", "shop.py").read_text()
    worker = start(
        "import os\n"
        + source.replace("WakaQ(\n", 'WakaQ(\n    url=os.environ["REDIS_URL"], wait_timeout=0.2,\n')
    )
    app = worker.app
    with app.wakaq.batch():
        for number in range(2_500):
            app.charge.delay(number, 100)
            app.charge.delay(number, 100, queue=app.LOW)
            app.daily_report.delay(queue="imports")
            app.send_reminders.delay(number)

    def all_ran():
        for queue in ("payments", "emails", "imports", "reports"):
            assert redis.hgetall(f"wakaq:stats:{queue}") == {b"done": b"2500"}

    eventually(all_ran, within=15)
    assert worker.stop() == 0
    assert_all_settled(redis)


def test_a_worker_takes_the_more_urgent_of_waiting_tasks(start, redis):
    worker = start(SINGLE)
    app = worker.app
    app.nap.delay(0.3, "first")
    assert popped(redis, 1, "started") == ["first"]
    for number in range(40):
        app.note.delay(f"low {number}")
        app.note.delay(f"high {number}", queue="high")

    expected = [f"{queue} {number}" for queue in ("high", "low") for number in range(40)]
    assert popped(redis, 81) == ["first", *(repr(((name,), {})) for name in expected)]


def test_an_urgent_task_overtakes_those_that_wait_while_tasks_take_long(start, redis):
    worker = start(SINGLE)
    for number in range(4):
        worker.app.nap.delay(0.1, f"low {number}")
    popped(redis, 2, "started")
    worker.app.nap.delay(0.1, "high", queue="high")

    assert popped(redis, 5).index("high") == 2


def test_a_long_task_delays_no_short_one_while_a_worker_is_idle(start, redis, eventually):
    worker = start(APP)
    app = worker.app
    worker.workers(2)
    # Short tasks first, so that workers are given many at a time when the long one comes among
    # them.
    with app.wakaq.batch():
        for number in range(500):
            app.nap.delay(0, f"before {number}")
        app.nap.delay(30, "long")
        for number in range(500):
            app.nap.delay(0, f"after {number}")

    assert "long" not in popped(redis, 1_000, within=2)
    eventually(lambda: redis.hget("wakaq:stats:low", "done") == b"1000")
    assert worker.stop(3) == 0  # SIGQUIT: the long one goes back
    assert redis.llen("wakaq:low") == 1
    assert_all_settled(redis)


def test_a_task_that_comes_to_an_idle_machine_starts_at_once(start, redis):
    worker = start(
        APP.replace('client.rpush("done", repr', 'client.rpush("done", time.monotonic(), repr')
    )
    times = []
    worker.workers(2)
    for number in range(20):
        sent = time.monotonic()
        worker.app.note.delay(number)
        times.append(float(popped(redis, 1)[0]) - sent)
        popped(redis, 1)

    assert sorted(times)[10] < 0.05, times


def test_hooks_and_wrapper_go_around_every_task(start, redis):
    worker = start(
        SINGLE
        + """
@wakaq.after_worker_started
def booted(): client.rpush("done", "booted")
@wakaq.before_task_started
def before(): client.rpush("done", "before")
@wakaq.after_task_finished
def after(): client.rpush("done", "after")
@wakaq.wrap_tasks_with
def wrapped(function):
    def run(*args, **kwargs):
        client.rpush("done", "in")
        function(*args, **kwargs)
        client.rpush("done", "out")
    return run
@wakaq.task
def bad(): raise RuntimeError("no")
"""
    )
    worker.app.bad.delay()
    worker.app.nap.delay(0, "task")

    assert popped(redis, 4) == ["booted", "before", "in", "after"]
    assert popped(redis, 5) == ["before", "in", "task", "out", "after"]


def test_a_wrapper_may_take_the_call(start, redis):
    worker = start(
        SINGLE
        + """
@wakaq.wrap_tasks_with
def wrapped(function, args, kwargs):
    client.rpush("done", "in")
    function(*args, **kwargs)
    client.rpush("done", "out")
"""
    )
    worker.app.nap.delay(0, "task")

    assert popped(redis, 3) == ["in", "task", "out"]


def test_a_hook_that_fails_before_a_task_fails_the_task_and_the_worker_goes_on(
    start, redis, eventually
):
    worker = start(
        SINGLE
        + """
@wakaq.before_task_started
def before():
    if client.incr("hooks") == 1: raise RuntimeError("no")
@wakaq.after_task_finished
def after(): raise RuntimeError("never mind")
"""
    )
    worker.app.note.delay("first")
    worker.app.note.delay("second")

    assert popped(redis, 1) == ["(('second',), {})"]
    eventually(lambda: redis.hget("wakaq:stats:low", "done") == b"1")
    assert json.loads(redis.lindex("wakaq:dead:low", 0))["reason"] == "raised"
    assert "never mind" in worker.log


def test_excluded_queues_are_not_served(start, redis):
    worker = start(APP.replace("concurrency=2", 'concurrency=1, exclude_queues=["high"]'))
    worker.app.note.delay("no", queue="high")
    worker.app.note.delay("yes")

    assert popped(redis, 1) == ["(('yes',), {})"]
    assert worker.stop() == 0
    assert redis.llen("wakaq:high") == 1


def test_titles_say_what_every_process_does(start, redis, eventually):
    worker = start(APP)
    worker.app.nap.delay(30, "long")
    popped(redis, 1, "started")

    def titles_are_right():
        titles = sorted(title for title in worker.titles().values() if "wakaq-" in title)
        one, two = (
            ("running nap", "idle") if "worker 2 idle" in titles[-1] else ("idle", "running nap")
        )
        assert titles == [
            "wakaq-worker: fork server",
            "wakaq-worker: supervisor app.wakaq 2 workers, 1 busy",
            f"wakaq-worker: worker 1 {one}",
            f"wakaq-worker: worker 2 {two}",
        ]

    eventually(titles_are_right)


@pytest.mark.parametrize("is_rotated", [False, True])
def test_logs_go_to_the_file_also_after_its_rotation(start, redis, tmp_path, is_rotated):
    file = tmp_path / "worker.txt"
    worker = start(
        SINGLE.replace(
            "wait_timeout", f'worker_log_file={str(file)!r}, log_format="%(message)s", wait_timeout'
        )
        + """
import logging
@wakaq.task
def say(text):
    logging.getLogger("mine").warning("said %s", text)
    client.rpush("done", text)
"""
    )
    worker.app.say.delay("one")
    popped(redis, 1)
    if is_rotated:
        file.rename(tmp_path / "worker.1")
    worker.app.say.delay("two")
    popped(redis, 1)

    assert "in say args=['two'] kwargs={} retry=0: said two\n" in file.read_text()
    assert ("Started with 1 workers for app.wakaq\n" in file.read_text()) is not is_rotated
    assert worker.stop() == 0
    assert file.read_text().splitlines()[-1] == "Stopped"
