from datetime import timedelta

import pytest

from wakaq import ConfigError, Queue, WakaQ
from wakaq.queue import in_order


@pytest.mark.parametrize(
    ("spec", "name", "priority"),
    [
        ((0, "a"), "a", 0),
        (("a", 5), "a", 5),
        ([-1, "a"], "a", -1),
        ("A-b_c.9", "A-b_c.9", None),
        (Queue("a", 3), "a", 3),
    ],
)
def test_a_queue_comes_in_every_documented_form(spec, name, priority):
    queue = Queue.create(spec)

    assert (queue.name, queue.priority) == (name, priority)


@pytest.mark.parametrize(
    "spec",
    [
        (1, 2),
        ("a", "b"),
        ("a",),
        (1, "a", 2),
        5,
        None,
        {"name": "a"},
        ("a", 1.5),
        (True, "a"),
        b"a",
    ],
)
def test_any_other_form_is_refused_with_its_value(spec):
    with pytest.raises(ConfigError, match=r"queue|priority"):
        Queue.create(spec)


@pytest.mark.parametrize("name", ["", "a b", "a:b", "{a}", "\u00e4", "a\n", "a*", None, 5])
def test_a_name_that_could_spoil_a_key_is_refused(name):
    with pytest.raises(ConfigError, match="use letters, digits"):
        Queue(name)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"priority": "1"}, "queue 'a': priority='1'"),
        ({"priority": 1.5}, "queue 'a': priority=1.5: give a whole number"),
        ({"priority": True}, "queue 'a': priority=True"),
        ({"prefix": "x y"}, "queue 'a': prefix='x y': use letters, digits"),
        ({"prefix": ""}, "queue 'a': prefix=''"),
        ({"prefix": "a{b}"}, "queue 'a': prefix="),
        ({"prefix": 5}, "queue 'a': prefix=5"),
        ({"soft_timeout": -1}, "queue 'a': soft_timeout=-1"),
        ({"soft_timeout": "four"}, "queue 'a': soft_timeout='four': give a timedelta, or seconds"),
        ({"hard_timeout": 0}, "queue 'a': hard_timeout=0: .*more than 0"),
        ({"max_retries": -1}, "queue 'a': max_retries=-1"),
        ({"retry_on": 1}, "queue 'a': retry_on=1"),
        ({"retry_delay": "1"}, "queue 'a': retry_delay='1'"),
    ],
)
def test_a_bad_option_is_refused_with_the_name_of_the_queue(options, names):
    with pytest.raises(ConfigError, match=names):
        Queue("a", **options)


def test_the_options_of_a_queue_are_brought_into_one_form():
    queue = Queue(
        "a",
        soft_timeout=timedelta(minutes=1),
        hard_timeout=90,
        retry_on=KeyError,
        retry_delay=timedelta(seconds=2),
    )

    assert (queue.soft_timeout, queue.hard_timeout, queue.max_retries) == (60.0, 90.0, None)
    assert (queue.retry_on, queue.retry_delay) == ((KeyError,), 2.0)


def test_queues_are_served_by_priority_and_those_without_one_last_in_their_order():
    queues = in_order(["z", (2, "b"), ("a", 1), (1, "c"), "d", (-1, "e")])

    assert [queue.name for queue in queues] == ["e", "a", "c", "b", "z", "d"]


def test_the_default_queue_is_the_last_one():
    assert WakaQ(queues=["x", (0, "y")]).default_queue.name == "x"
    assert WakaQ(queues=[(0, "x"), (1, "y")]).default_queue.name == "y"


@pytest.mark.parametrize("specs", [[], (), None, "abc", {"a": 1}])
def test_no_queues_at_all_are_refused(specs):
    with pytest.raises(ConfigError, match="queues="):
        in_order(specs)


def test_two_queues_of_one_name_are_refused():
    with pytest.raises(ConfigError, match=r"\['a'\] given twice"):
        in_order(["a", (1, "a"), "b"])


def test_a_queue_is_checked_against_the_timeouts_of_the_app():
    with pytest.raises(ConfigError, match=r"queue 'slow': hard_timeout=60 .*soft_timeout=90"):
        WakaQ(queues=[Queue("slow", soft_timeout=90)], hard_timeout=60)
    with pytest.raises(ConfigError, match=r"queue 'a': hard_timeout=8 .*soft_timeout=9"):
        WakaQ(queues=[Queue("a", soft_timeout=9, hard_timeout=8)])
