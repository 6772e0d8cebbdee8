import random
import re
import subprocess
import sys
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest

from wakaq import ConfigError, CronTask

BERLIN = ZoneInfo("Europe/Berlin")


def moment(text, zone=UTC):
    return datetime.fromisoformat(text).replace(tzinfo=zone).timestamp()


def ticks(schedule, start, count, timezone=None):
    """Return ticks after `start`, a time in UTC, in UTC without year and seconds."""
    task = CronTask(schedule, "x", timezone=timezone)
    found, at = [], moment(start)
    for _ in range(count):
        at = task.next_tick(at)
        found.append(datetime.fromtimestamp(at, UTC).strftime("%m-%d %H:%M"))
    return found


@pytest.mark.parametrize(
    ("schedule", "after", "expected"),
    [
        ("*/5 * * * *", "2026-01-01T00:00:00", "2026-01-01T00:05:00"),
        ("*/5 * * * *", "2026-01-01T00:04:59.999", "2026-01-01T00:05:00"),
        ("*/5 * * * *", "2026-01-01T00:05:00.001", "2026-01-01T00:10:00"),
        ("* * * * * */2", "2026-01-01T00:00:00.5", "2026-01-01T00:00:02"),
        ("0 0 29 2 *", "2026-01-01T00:00:00", "2028-02-29T00:00:00"),
        ("@hourly", "2026-01-01T00:30:00", "2026-01-01T01:00:00"),
        ("0 6 * * mon-fri", "2026-01-02T06:00:00", "2026-01-05T06:00:00"),
    ],
)
def test_the_next_tick_is_the_first_one_later(schedule, after, expected):
    assert CronTask(schedule, "x").next_tick(moment(after)) == moment(expected)


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        ("2026-01-01T00:05:00", "2026-01-01T00:05:00"),
        ("2026-01-01T00:05:00.7", "2026-01-01T00:05:00"),
        ("2026-01-01T00:04:59.9", "2026-01-01T00:00:00"),
    ],
)
def test_the_previous_tick_is_the_last_one_not_later(at, expected):
    assert CronTask("*/5 * * * *", "x").previous_tick(moment(at)) == moment(expected)


def test_an_hour_that_the_clocks_skip_fires_when_it_ends():
    # 29 March 2026, 02:00 CET is 03:00 CEST, which is 01:00 UTC.
    assert ticks("30 2 * * *", "2026-03-27T12:00", 3, "Europe/Berlin") == [
        "03-28 01:30",
        "03-29 01:00",
        "03-30 00:30",
    ]
    assert ticks("0 * * * *", "2026-03-28T23:30", 3, "Europe/Berlin") == [
        "03-29 00:00",
        "03-29 01:00",
        "03-29 02:00",
    ]


def test_an_hour_that_comes_twice_fires_twice():
    # 25 October 2026, 03:00 CEST is 02:00 CET, which is 01:00 UTC.
    assert ticks("30 2 * * *", "2026-10-24T12:00", 3, "Europe/Berlin") == [
        "10-25 00:30",
        "10-25 01:30",
        "10-26 01:30",
    ]
    assert ticks("0 3 * * *", "2026-10-24T12:00", 2, "Europe/Berlin") == [
        "10-25 02:00",
        "10-26 02:00",
    ]


def test_without_a_time_zone_it_is_utc():
    assert ticks("30 2 * * *", "2026-03-28T12:00", 2) == ["03-29 02:30", "03-30 02:30"]


@pytest.mark.parametrize("change", ["2026-03-29T01:00", "2026-10-25T01:00"])
@pytest.mark.parametrize("schedule", ["*/30 * * * *", "30 2 * * *", "0 1-3 * * *"])
def test_around_a_change_of_clocks_both_directions_agree_from_every_moment(schedule, change):
    task = CronTask(schedule, "x", timezone="Europe/Berlin")
    start, end = moment(change) - 90_000, moment(change) + 90_000
    at, all_ticks = task.next_tick(start), []
    while at < end:
        all_ticks.append(at)
        at = task.next_tick(at)
    moments = random.Random(7).choices(range(int(all_ticks[0]), int(all_ticks[-1])), k=20)

    for now in (*moments, *all_ticks[:-1]):
        assert task.next_tick(now) == min(tick for tick in all_ticks if tick > now)
        assert task.previous_tick(now) == max(tick for tick in all_ticks if tick <= now)


@pytest.mark.parametrize(
    "schedule",
    [
        "",
        "bad",
        "* * * *",
        "* * * * * * *",
        "61 * * * *",
        "0 0 31 2 *",
        "@reboot",
        "@every 5m",
        "*/0 * * * *",
        "H * * * *",
        "R * * * *",
        "0 r(1-5) * * *",
        None,
        5,
    ],
)
def test_a_bad_expression_is_refused_by_name(schedule):
    with pytest.raises(ConfigError, match=re.escape(f"schedule {schedule!r} of 'report'")):
        CronTask(schedule, "report")


@pytest.mark.parametrize("timezone", ["Europe/Atlantis", "", "../etc/passwd", "Europe", "/etc", 5])
def test_an_unknown_time_zone_is_refused_by_name(timezone):
    with pytest.raises(ConfigError, match=r"timezone=.*is unknown: give an IANA name"):
        CronTask("* * * * *", "report", timezone=timezone)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"args": "ab"}, "args='ab'"),
        ({"args": {"a": 1}}, "args="),
        ({"args": 5}, "args=5"),
        ({"kwargs": [1]}, r"kwargs=\[1\]"),
        ({"kwargs": {1: 2}}, "kwargs has the key 1"),
        ({"args": [object()]}, r"args\[0\] is a object"),
    ],
)
def test_arguments_that_could_not_be_sent_are_refused(options, names):
    with pytest.raises(ConfigError, match=names):
        CronTask("* * * * *", "report", **options)


@pytest.mark.parametrize("task", [None, "", 5])
def test_something_that_is_no_task_is_refused(task):
    with pytest.raises(ConfigError, match="give a task or its name"):
        CronTask("* * * * *", task)


@pytest.mark.parametrize(
    ("spec", "args", "kwargs"),
    [
        (("@daily", "x"), [], {}),
        (("@daily", "x", (1, 2)), [1, 2], {}),
        (["@daily", "x", [1], {"a": 2}], [1], {"a": 2}),
        (CronTask("@daily", "x", "q", None, {"a": 1}), [], {"a": 1}),
    ],
)
def test_a_schedule_comes_in_every_documented_form(spec, args, kwargs):
    task = CronTask.create(spec)

    assert (task.schedule, task.task_name, task.args, task.kwargs) == ("@daily", "x", args, kwargs)


@pytest.mark.parametrize("spec", ["@daily", ("@daily",), ("@daily", "x", [], {}, 1), 5, None])
def test_any_other_form_is_refused(spec):
    with pytest.raises(ConfigError, match="give a CronTask or"):
        CronTask.create(spec)


def test_a_task_may_be_given_itself(app):
    @app.task
    def report(): ...

    assert CronTask("@daily", report).task_name == "report"


def test_its_payload_is_the_call():
    assert CronTask("@daily", "x", args=[1]).payload == b'{"name": "x", "args": [1], "kwargs": {}}'


def test_the_identity_tells_schedules_apart_and_is_fit_for_a_key():
    tasks = [
        CronTask("@daily", "x"),
        CronTask("@hourly", "x"),
        CronTask("@daily", "y:{\u00e4}"),
        CronTask("@daily", "x", args=[1]),
        CronTask("@daily", "x", kwargs={"a": 1}),
        CronTask("@daily", "x", timezone="Europe/Berlin"),
    ]

    assert len({task.identity for task in tasks}) == len(tasks)
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+", task.identity) for task in tasks)


def test_the_identity_is_the_same_in_every_process_and_wherever_the_call_goes():
    assert CronTask("@daily", "x").identity == "x-640f6cd786a51064"
    assert CronTask("@daily", "x", queue="q").identity == CronTask("@daily", "x").identity


def test_without_a_schedule_nothing_heavy_is_imported():
    heavy = {
        "croniter",
        "psutil",
        "setproctitle",
        "click",
        "rich",
        "multiprocessing",
        "logging.handlers",
        "zoneinfo",
    }
    code = (
        "import sys, redis; before = set(sys.modules); import wakaq;"
        "wakaq.WakaQ(queues=['a']).task(print); print(*set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "wakaq.app" in done.stdout.split()
    assert not heavy & set(done.stdout.split())
