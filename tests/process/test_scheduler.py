"""`wakaq-scheduler` and `wakaq-worker --scheduler` as processes.

Each tick once, whatever happens to one of them.
"""

import re
import signal
import time
from contextlib import closing
from datetime import datetime

import pytest

APP = """
import os
from wakaq import CronTask, WakaQ

wakaq = WakaQ(
    queues=["default"],
    url=os.environ["REDIS_URL"],
    concurrency=1,
    wait_timeout=0.2,
    schedules=[CronTask("SCHEDULE", "note", args=[1])],
    OPTIONS
)

@wakaq.task
def note(number):
    wakaq.broker.client.rpush("done", number)
"""
FIRED = re.compile(r"Enqueued note of (\S+),")


def app(schedule="* * * * * *", options=""):
    return APP.replace("SCHEDULE", schedule).replace("OPTIONS", options)


def fired(*schedulers):
    """Return the unix times of all ticks that these say they enqueued, in order."""
    texts = [text for scheduler in schedulers for text in FIRED.findall(scheduler.log)]
    return sorted(datetime.fromisoformat(text).timestamp() for text in texts)


@pytest.fixture
def run_three(start, redis, eventually):
    """Return a function that runs three schedulers, kills one, and checks each tick."""

    def run(source, interval, kill_after, end_after):
        first = start(source, "scheduler")
        all_three = [first, start(first.app, "scheduler"), start(first.app, "scheduler")]
        eventually(lambda: len(fired(*all_three)) > kill_after, within=10 + kill_after * interval)
        eventually(lambda: all("next note at" in one.log for one in all_three))
        first.process.kill()
        first.wait()
        eventually(lambda: len(fired(*all_three)) > end_after, within=10 + end_after * interval)
        statuses = [one.stop() for one in all_three[1:]]
        ticks = fired(*all_three)

        assert statuses == [0, 0]
        count = round((ticks[-1] - ticks[0]) / interval) + 1
        assert redis.llen("wakaq:default") == count
        assert set(ticks) <= {ticks[0] + interval * number for number in range(count)}
        # Nothing but the log's line may be missing of the one that was killed.
        assert len(ticks) in {count, count - 1}

    return run


def test_of_three_schedulers_one_enqueues_each_tick_also_when_one_is_killed(run_three):
    run_three(app(), interval=1, kill_after=2, end_after=5)


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_the_same_for_ninety_seconds(run_three):
    run_three(app("* * * * * */2"), interval=2, kill_after=20, end_after=45)


def test_the_title_and_the_log_say_what_comes_next(start, eventually):
    scheduler = start(app("0 6 * * *"), "scheduler")

    def has_title():
        (title,) = scheduler.titles().values()
        assert re.fullmatch(r"wakaq-scheduler: next note at 20\d\d-\d\d-\d\dT06:00Z", title)

    eventually(has_title)
    assert re.search(r"next note at 20\d\d-\d\d-\d\dT06:00Z", scheduler.log)
    assert scheduler.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_at_once(start, eventually, number):
    scheduler = start(app("0 6 * * *"), "scheduler")
    eventually(lambda: "next note" in scheduler.log)
    began = time.monotonic()

    assert scheduler.stop(number) == 0
    assert time.monotonic() - began < 1


def test_it_stops_while_redis_hangs(start, eventually, make_server):
    server = make_server()
    scheduler = start(app(), "scheduler", url=server.url)
    eventually(lambda: "Enqueued" in scheduler.log)
    server.process.send_signal(signal.SIGSTOP)
    try:
        count = scheduler.log.count("Enqueued")
        began = time.monotonic()
        # It is in its call by then, or the call would have been answered.
        eventually(lambda: time.monotonic() > began + 1.1)

        assert scheduler.stop() == 0
        assert scheduler.log.count("Enqueued") <= count + 1
    finally:
        server.process.send_signal(signal.SIGCONT)


def test_it_lives_through_an_outage_which_is_logged_once_at_each_end(
    start, eventually, make_server
):
    server = make_server()
    scheduler = start(app(), "scheduler", url=server.url)
    eventually(lambda: "Enqueued" in scheduler.log)
    server.kill()
    eventually(lambda: "Redis is away" in scheduler.log)
    count = scheduler.log.count("Enqueued")
    server.start()

    eventually(lambda: scheduler.log.count("Enqueued") >= count + 2)
    eventually(lambda: "Redis is back" in scheduler.log, within=10)
    assert scheduler.log.count("Redis is away") == scheduler.log.count("Redis is back") == 1
    assert scheduler.stop() == 0
    with closing(server.client()) as client:
        assert client.llen("wakaq:default") >= 2


def test_a_worker_runs_the_scheduler_as_well_if_asked_to(start, redis):
    worker = start(app(), "worker", "--scheduler")

    assert redis.blpop("done", timeout=10) == (b"done", b"1")
    assert redis.blpop("done", timeout=10) == (b"done", b"1")
    titles = worker.titles().values()
    assert sum("supervisor" in title for title in titles) == 1
    assert not any("scheduler:" in title for title in titles)
    assert worker.stop() == 0


def test_a_worker_that_is_not_asked_to_runs_no_scheduler(start, redis):
    worker = start(app(), "worker")
    worker.workers(1)
    worker.app.note.delay(2)

    assert redis.blpop("done", timeout=10) == (b"done", b"2")
    assert redis.keys("wakaq:cron:*") == []
    assert worker.stop() == 0


def test_it_logs_to_its_own_file_at_its_own_level(start, eventually, tmp_path, redis):
    options = 'scheduler_log_file="scheduler.txt", scheduler_log_level="INFO"'
    scheduler = start(app(options=options), "scheduler")
    redis.ping()

    eventually(lambda: "Enqueued note" in (tmp_path / "scheduler.txt").read_text())
    assert "next note" not in (tmp_path / "scheduler.txt").read_text()
    assert scheduler.log == ""
    assert scheduler.stop() == 0


def test_without_schedules_it_says_so_and_waits(start, eventually):
    source = app().replace('CronTask("* * * * * *", "note", args=[1])', "")
    scheduler = start(source, "scheduler")

    eventually(lambda: "no schedules, nothing to do" in scheduler.log)
    assert scheduler.stop() == 0


def test_a_schedule_of_an_unknown_task_is_one_line(start):
    scheduler = start(app().replace('"note", args', '"nope", args'), "scheduler")

    assert scheduler.wait() == 2
    assert scheduler.log.splitlines() == [
        "wakaq: CronTask('* * * * * *', 'nope') names an unknown task; the known ones: note"
    ]


def test_a_redis_that_is_not_there_is_one_line(start, tmp_path):
    scheduler = start(app(), "scheduler", url=f"unix://{tmp_path}/nothing.sock")

    assert scheduler.wait() == 2
    (line,) = scheduler.log.splitlines()
    assert line.startswith("wakaq: Redis cannot be used")
