import dataclasses
import inspect
import math
import re
import typing
from datetime import timedelta
from pathlib import Path

import pytest

from wakaq import ConfigError, Queue, SoftTimeout, Task, WakaQ
from wakaq.settings import LIMITS, Policy, Settings

CONFIGURATION = Path(__file__).parents[2] / "docs" / "configuration.md"


def make(**options):
    return WakaQ(queues=["default"], **options)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, None), (3, 3.0), (0.5, 0.5), (10**9, 1e9), (timedelta(minutes=2), 120.0)],
)
def test_a_duration_is_seconds_or_a_timedelta(value, expected):
    assert make(hard_timeout=value).settings.hard_timeout == expected


@pytest.mark.parametrize(
    "value", [0, -1, 0.0, timedelta(0), timedelta(days=-1), math.nan, math.inf, True, "5", 1e10]
)
def test_a_duration_that_makes_no_sense_is_refused_by_name(value):
    with pytest.raises(
        ConfigError, match=r"hard_timeout=.*give a timedelta, or seconds, more than 0"
    ):
        make(hard_timeout=value)


def test_0_is_a_duration_where_it_says_so():
    assert make(retry_delay=0).settings.retry_delay == 0.0
    with pytest.raises(ConfigError, match=r"retry_delay=-1: .*0 or more"):
        make(retry_delay=-1)


def test_settings_have_the_documented_defaults():
    settings = make().settings

    assert settings.url is None
    assert (settings.host, settings.port, settings.db, settings.prefix) == (
        "localhost",
        6379,
        0,
        "wakaq",
    )
    assert (settings.soft_timeout, settings.hard_timeout, settings.max_retries) == (None, None, 0)
    assert (settings.retry_on, settings.retry_delay) == ((SoftTimeout,), 0.0)
    assert (settings.max_redeliveries, settings.dead_letters) == (3, 10_000)
    assert (settings.worker_log_level, settings.scheduler_log_level) == (20, 10)
    assert (settings.socket_timeout, settings.health_check_interval) == (15.0, 30.0)
    assert (settings.async_concurrency, settings.wait_timeout) == (0, 1.0)


@pytest.mark.parametrize("percent", [1, 50.5, 99])
def test_a_memory_limit_is_a_percentage(percent):
    assert make(max_mem_percent=percent).settings.max_mem_percent == percent


def test_options_are_brought_into_one_form():
    settings = make(
        shutdown_timeout=timedelta(minutes=1),
        worker_log_level="warning",
        scheduler_log_level=35,
        exclude_queues=["default"],
        retry_on=ConnectionError,
        health_check_interval=0,
        worker_log_file=Path("x.log"),
        concurrency="cores * 0 + 3",
        async_concurrency="10**2",
        max_mem_percent=99,
    ).settings

    assert settings.shutdown_timeout == 60.0
    assert (settings.worker_log_level, settings.scheduler_log_level) == (30, 35)
    assert settings.exclude_queues == ("default",)
    assert settings.retry_on == (ConnectionError,)
    assert settings.health_check_interval == 0.0
    assert (settings.concurrency, settings.async_concurrency) == (3, 100)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"url": "http://x:secret@y"}, "url starts with 'http': give"),
        ({"url": 5}, "url starts with 'int': give"),
        ({"host": ""}, "host=''"),
        ({"host": None}, "host=None"),
        ({"port": 70_000}, "port=70000.*1 to 65535"),
        ({"port": "6379"}, "port='6379'"),
        ({"port": None}, "port=None"),
        ({"db": -1}, "db=-1"),
        ({"prefix": "a b"}, "prefix='a b'"),
        ({"prefix": ""}, "prefix=''"),
        ({"prefix": "a{b}"}, "prefix"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"concurrency": None}, "concurrency=None"),
        ({"async_concurrency": -1}, "async_concurrency=-1"),
        ({"exclude_queues": "default"}, "exclude_queues='default': give a list of names"),
        ({"exclude_queues": 5}, "exclude_queues=5"),
        ({"soft_timeout": 0}, "WakaQ: soft_timeout=0"),
        ({"hard_timeout": -3}, "WakaQ: hard_timeout=-3"),
        ({"soft_timeout": 5, "hard_timeout": 5}, "hard_timeout=5 is not above soft_timeout=5"),
        ({"soft_timeout": timedelta(minutes=2), "hard_timeout": 60}, "=60 .*=120"),
        ({"max_retries": -1}, "max_retries=-1"),
        ({"max_retries": None}, "max_retries=None: leave it out"),
        ({"max_retries": 1.5}, "max_retries=1.5"),
        ({"max_retries": True}, "max_retries=True"),
        ({"retry_on": "SoftTimeout"}, "retry_on='SoftTimeout'"),
        ({"retry_on": (SoftTimeout, 5)}, r"retry_on=\(.*, 5\)"),
        ({"retry_on": ValueError("x")}, "retry_on=ValueError"),
        ({"retry_delay": -1}, "retry_delay=-1"),
        ({"max_redeliveries": -1}, "max_redeliveries=-1"),
        ({"max_mem_percent": 0}, "max_mem_percent=0"),
        ({"max_mem_percent": 100}, "max_mem_percent=100"),
        ({"max_mem_percent": True}, "max_mem_percent=True"),
        ({"max_mem_percent": "90"}, "max_mem_percent='90'"),
        ({"max_mem_percent": timedelta(seconds=50)}, "max_mem_percent="),
        ({"max_tasks_per_worker": 0}, "max_tasks_per_worker=0"),
        ({"shutdown_timeout": -1}, "shutdown_timeout=-1"),
        ({"dead_letters": -1}, "dead_letters=-1"),
        ({"worker_log_level": "LOUD"}, "worker_log_level='LOUD': give one of .*INFO"),
        ({"scheduler_log_level": -1}, "scheduler_log_level=-1"),
        ({"worker_log_file": 5}, "worker_log_file=5"),
        ({"scheduler_log_file": 5.5}, "scheduler_log_file=5.5"),
        ({"log_format": "%(task)s"}, r"log_format='%\(task\)s'"),
        ({"log_format": "%(message"}, "log_format"),
        ({"log_format": "%(message)d"}, "log_format"),
        ({"log_format": "{message}"}, "log_format"),
        ({"task_log_format": "%(nothing)s"}, "task_log_format"),
        ({"task_log_format": "no field"}, "task_log_format"),
        ({"socket_timeout": None}, "socket_timeout=None"),
        ({"socket_timeout": 0}, "socket_timeout=0"),
        ({"wait_timeout": 0}, "wait_timeout=0"),
        ({"wait_timeout": 15}, "wait_timeout=15 is not below socket_timeout=15"),
    ],
)
def test_a_bad_option_is_refused_by_name_and_value(options, names):
    with pytest.raises(ConfigError, match=names) as caught:
        make(**options)

    assert "secret" not in str(caught.value)


def test_task_fields_are_for_the_format_in_tasks():
    task_log_format = "%(task)s %(task_args)s %(task_kwargs)s %(task_retry)d"

    assert make(task_log_format=task_log_format).settings.task_log_format == task_log_format
    assert "%(task)s" in make().settings.task_log_format
    assert "%(task)s" not in make().settings.log_format


def test_a_password_is_not_shown():
    settings = make(password="secret-1", url="redis://:secret-2@localhost").settings

    assert "secret" not in repr(settings)


@pytest.mark.parametrize(
    "name", ["soft_timeout", "hard_timeout", "max_retries", "retry_on", "retry_delay"]
)
def test_the_task_decides_then_its_queue_then_the_app(name):
    values = {
        "soft_timeout": (1.0, 2.0, 3.0),
        "hard_timeout": (4.0, 5.0, 6.0),
        "max_retries": (0, 8, 9),
        "retry_on": ((), (KeyError,), (OSError,)),
        "retry_delay": (0.0, 11.0, 12.0),
    }[name]
    app = WakaQ(queues=[Queue("own", **{name: values[1]}), "other"], **{name: values[2]})

    @app.task(**{name: values[0]})
    def with_its_own(): ...

    @app.task
    def without(): ...

    own, other = app.queues_by_name["own"], app.queues_by_name["other"]

    assert getattr(app.policy(with_its_own, own), name) == values[0]
    assert getattr(app.policy(without, own), name) == values[1]
    assert getattr(app.policy(without, other), name) == values[2]


def policy(retry_delay):
    return Policy(None, None, 1, (), retry_delay)


def test_the_delay_before_a_retry_is_a_number_or_what_the_function_says():
    assert policy(2.5).delay_before(1) == 2.5
    assert policy(lambda retry: 2**retry).delay_before(3) == 8.0
    assert policy(lambda retry: timedelta(minutes=retry)).delay_before(2) == 120.0
    assert policy(lambda _: 0).delay_before(1) == 0.0
    assert policy(lambda _: None).delay_before(1) == 0.0
    with pytest.raises(ConfigError, match=r"retry_delay\(4\)=-4"):
        policy(lambda retry: -retry).delay_before(4)


def test_an_address_that_is_an_empty_environment_variable_is_none():
    assert make(url="").settings.url is None


# -- nothing is forgotten --------------------------------------------------------------------------

# A value of each option that is not its default, and what it is in the settings.
EXAMPLES = {
    "url": ("redis://x", "redis://x"),
    "host": ("x", "x"),
    "port": (1, 1),
    "username": ("x", "x"),
    "password": ("x", "x"),
    "db": (1, 1),
    "prefix": ("x", "x"),
    "concurrency": ("7+0*cores", 7),
    "async_concurrency": ("8", 8),
    "exclude_queues": (["default"], ("default",)),
    "soft_timeout": (timedelta(seconds=5), 5.0),
    "hard_timeout": (5, 5),
    "max_retries": (1, 1),
    "retry_on": (KeyError, (KeyError,)),
    "retry_delay": (timedelta(seconds=5), 5.0),
    "max_redeliveries": (1, 1),
    "max_mem_percent": (50, 50),
    "max_tasks_per_worker": (1, 1),
    "shutdown_timeout": (timedelta(seconds=5), 5.0),
    "dead_letters": (1, 1),
    "worker_log_file": (Path("x"), "x"),
    "scheduler_log_file": ("x", "x"),
    "worker_log_level": ("debug", 10),
    "scheduler_log_level": (20, 20),
    "log_format": ("x %(message)s", "x %(message)s"),
    "task_log_format": ("x %(message)s", "x %(message)s"),
    "socket_timeout": (5, 5),
    "socket_connect_timeout": (5, 5),
    "health_check_interval": (0, 0),
    "wait_timeout": (0.5, 0.5),
    "synchronous_mode": (True, True),
}


def parameters(function):
    return set(inspect.signature(function).parameters)


def documented(section):
    """Return the options in the tables of a part of the page on configuration."""
    return set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))


def test_every_option_of_the_application_is_a_setting_and_on_the_page_about_configuration():
    options = parameters(WakaQ)
    of_the_app = CONFIGURATION.read_text().partition("## A queue's options")[0]

    assert {field.name for field in dataclasses.fields(Settings)} == options - {
        "queues",
        "schedules",
    }
    assert documented(of_the_app) == options
    assert set(EXAMPLES) == options - {"queues", "schedules"}, "add an example for the test below"


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_option_of_the_application_arrives_in_its_settings(name):
    given, expected = EXAMPLES[name]

    assert getattr(make().settings, name) != expected
    assert getattr(make(**{name: given}).settings, name) == expected


def test_every_option_of_a_queue_and_of_a_task_is_on_the_page_about_configuration():
    text = CONFIGURATION.read_text()
    of_queues = text.partition("## A queue's options")[2].partition("## A task's options")[0]
    signatures = dict(re.findall(r"^`(\S+)\(([\w, ]+)\)`$", text, re.MULTILINE))

    assert set(signatures) == {"Queue", "@wakaq.task"}
    assert signatures["Queue"].split(", ") == list(inspect.signature(Queue).parameters)
    assert documented(of_queues) | set(LIMITS) == parameters(Queue)
    assert set(signatures["@wakaq.task"].split(", ")) == {"queue", *LIMITS}


def test_the_app_its_queues_and_its_tasks_take_the_same_limits():
    _, with_options = typing.get_overloads(WakaQ.task)

    assert set(LIMITS) <= parameters(WakaQ)
    assert set(LIMITS) == parameters(Queue) - {"name", "priority", "prefix"}
    assert set(LIMITS) == parameters(Task) - {"app", "function", "queue"}
    assert set(LIMITS) == parameters(with_options) - {"self", "queue"}


@pytest.mark.parametrize(
    ("limit", "value"),
    [
        *(
            (name, value)
            for name in ("soft_timeout", "hard_timeout")
            for value in (0, "four", True)
        ),
        *(("max_retries", value) for value in (-1, 1.5, "3", True, 2**31 + 1)),
        *(("retry_on", value) for value in ("SoftTimeout", [ValueError], (5,), ValueError())),
        *(("retry_delay", value) for value in (-1, "1", math.nan, False)),
    ],
)
def test_a_bad_limit_is_refused_alike_for_the_app_a_queue_and_a_task(limit, value):
    def report(): ...

    messages = []
    for owner, make_it in {
        "WakaQ": lambda: make(**{limit: value}),
        "queue 'a'": lambda: Queue("a", **{limit: value}),
        "task 'report'": lambda: make().task(**{limit: value})(report),
    }.items():
        with pytest.raises(ConfigError) as caught:
            make_it()
        messages.append(str(caught.value).removeprefix(owner))

    assert messages[0].startswith(f": {limit}={value!r}: give a")
    assert len(set(messages)) == 1


def test_settings_may_be_copied_with_other_values():
    settings = dataclasses.replace(make(soft_timeout=5).settings, url="unix:///x")

    assert (settings.url, settings.soft_timeout) == ("unix:///x", 5.0)
