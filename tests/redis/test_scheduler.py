"""Which ticks a scheduler enqueues, and when it wants to be asked again.

`tick` is called here, by no thread.
"""

import logging
import time
from contextlib import closing
from datetime import UTC, datetime

import pytest

from wakaq import CronTask, WakaQ
from wakaq.scheduler import Scheduler
from wakaq.service import Outage
from wakaq.store.broker import Broker
from wakaq.store.connection import RedisError, is_outage


@pytest.fixture
def make(app_url):
    """Return a function that makes a scheduler of schedules, with a list of what it shows."""
    brokers = []

    def make(*schedules, url=app_url):
        app = WakaQ(queues=["high", "low"], url=url, schedules=schedules)

        @app.task(queue="high")
        def report(number=0): ...

        @app.task
        def other(): ...

        app.validate()
        broker = Broker(app.settings, app.queues)
        brokers.append(broker)
        titles = []
        return Scheduler(app, broker, titles.append, Outage()), titles

    yield make
    for broker in brokers:
        broker.close()


def daily(minutes_ago):
    """Return an expression that matched once, so many full minutes ago."""
    moment = datetime.fromtimestamp(time_of_day() - 60 * minutes_ago, UTC)
    return f"{moment.minute} {moment.hour} * * *"


def time_of_day():
    """Return unix time, not in the last seconds of a minute, when a test would see two of them."""
    now = datetime.now(UTC)
    if now.second > 57:
        time.sleep(60.1 - now.second)
        now = datetime.now(UTC)
    return now.timestamp()


def test_a_tick_missed_five_minutes_ago_is_enqueued_once(make, redis):
    schedule = daily(5), "report"

    first, _ = make(schedule)
    first.tick(time.monotonic())
    first.tick(time.monotonic())
    second, _ = make(schedule)
    second.tick(time.monotonic())

    assert redis.lrange("wakaq:high", 0, -1) == [b'{"name": "report", "args": [], "kwargs": {}}']


def test_a_tick_missed_fifteen_minutes_ago_is_not_enqueued(make, redis):
    scheduler, titles = make((daily(15), "report"))

    scheduler.tick(time.monotonic())

    assert redis.keys("*") == []
    assert len(titles) == 1


def test_of_many_missed_ticks_only_the_latest_is_enqueued(make, redis):
    scheduler, _ = make(("* * * * *", "report"))
    tick = time_of_day() // 60 * 60

    scheduler.tick(time.monotonic())

    assert redis.llen("wakaq:high") == 1
    (key,) = redis.keys("wakaq:cron:*")
    assert float(redis.get(key)) == tick


def test_a_short_stall_of_a_running_scheduler_loses_no_tick(make, redis, eventually):
    scheduler, _ = make(("* * * * * *", "report"))
    scheduler.tick(time.monotonic())
    (key,) = redis.keys("wakaq:cron:*")
    first = float(redis.get(key))
    eventually(lambda: redis.time()[0] >= first + 3)

    scheduler.tick(time.monotonic())

    assert redis.llen("wakaq:high") == float(redis.get(key)) - first + 1 >= 4


def test_a_scheduler_asks_to_be_asked_again_at_the_next_tick(make, redis):
    scheduler, _ = make(("* * * * * */2", "report"))

    wait = scheduler.tick(time.monotonic())

    seconds, microseconds = redis.time()
    due = seconds + microseconds / 1e6 + wait
    assert due == pytest.approx(round(due / 2) * 2, abs=0.05)


def test_a_scheduler_looks_at_the_clock_now_and_then(make):
    scheduler, _ = make((daily(60), "report"))

    assert scheduler.tick(time.monotonic()) == 30


def test_without_schedules_there_is_nothing_to_do_and_the_title_says_so(make, redis):
    scheduler, titles = make()

    assert scheduler.tick(time.monotonic()) == 30
    assert titles == ["wakaq-scheduler: no schedules, nothing to do"]
    assert redis.keys("*") == []


@pytest.mark.parametrize(
    ("schedule", "queue"),
    [
        (("* * * * *", "report"), "high"),
        (("* * * * *", "other"), "low"),
        (CronTask("* * * * *", "report", queue="low"), "low"),
    ],
)
def test_the_queue_is_the_schedules_else_the_tasks_else_the_default_one(
    make, redis, schedule, queue
):
    scheduler, _ = make(schedule)

    scheduler.tick(time.monotonic())

    assert redis.llen(f"wakaq:{queue}") == 1


def test_two_calls_of_one_task_at_one_moment_are_two_schedules(make, redis):
    scheduler, _ = make(("* * * * *", "report", [1]), ("* * * * *", "report", [2]))

    scheduler.tick(time.monotonic())

    assert redis.llen("wakaq:high") == 2


def test_title_and_log_say_what_comes_next_to_the_minute_or_second(make, caplog):
    with caplog.at_level(logging.DEBUG, "wakaq"):
        scheduler, titles = make((daily(60), "other"), (daily(30), "report"))
        scheduler.tick(time.monotonic())
        scheduler.tick(time.monotonic())
        by_seconds, more = make(("* * * * * 1-59/2", "report"))
        by_seconds.tick(time.monotonic())

    (title,) = titles
    moment = title.removeprefix("wakaq-scheduler: next other at ")
    assert datetime.strptime(moment, "%Y-%m-%dT%H:%MZ").replace(tzinfo=UTC) > datetime.now(UTC)
    assert datetime.strptime(more[0][-20:], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    assert caplog.messages.count(f"next other at {moment}") == 1


def test_a_queue_that_refuses_holds_up_no_other_schedule(make, redis, caplog):
    redis.set("wakaq:high", "no list")
    scheduler, _ = make(("* * * * *", "report"), ("* * * * *", "other"))

    scheduler.tick(time.monotonic())
    scheduler.tick(time.monotonic())

    assert redis.llen("wakaq:low") == 1
    assert caplog.text.count("cannot be enqueued: its tick is skipped") == 1
    assert "WRONGTYPE" in caplog.text


def test_an_outage_goes_to_the_caller_and_the_tick_stays_due(make, make_server):
    server = make_server()
    scheduler, _ = make(("* * * * *", "report"), url=server.url)
    with closing(server.client()) as client:
        client.config_set("maxmemory", 1)
        with pytest.raises(RedisError) as caught:
            scheduler.tick(time.monotonic())
        assert is_outage(caught.value)
        client.config_set("maxmemory", 0)

        scheduler.tick(time.monotonic())

        assert client.llen("wakaq:high") == 1
