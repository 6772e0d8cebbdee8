"""How work that arrives wakes an idle machine: a waker's own ticks, on a real server."""

import threading

import pytest

from wakaq.store import connection
from wakaq.supervisor.sender import Sender
from wakaq.supervisor.waker import REFUSED_PAUSE, Idleness, Waker

LOW, HEAD = "wakaq:low", "wakaq:head:low"


@pytest.fixture
def idleness():
    """A machine that is idle and has room."""
    idleness = Idleness()
    idleness.is_idle.set()
    idleness.has_room = True
    return idleness


@pytest.fixture
def sender(redis_app, outage):
    return Sender(redis_app.broker, lambda *_: None, outage, 1.0)


@pytest.fixture
def make_waker(redis_app, idleness, sender, outage, redis):  # noqa: ARG001 - it empties the server
    def make(queue):
        return Waker(redis_app.broker, redis_app.queues_by_name[queue], idleness, sender, outage)

    return make


@pytest.fixture
def waker(make_waker):
    return make_waker("low")


def test_what_has_arrived_wakes_the_sender_once_and_is_in_the_head(waker, idleness, sender, redis):
    redis.rpush(LOW, "a", "b")
    assert waker.tick(0.0) is None

    assert sender._is_woken
    assert not idleness.is_idle.is_set()
    assert redis.lrange(HEAD, 0, -1) == [b"a"]
    assert redis.lrange(LOW, 0, -1) == [b"b"]


def test_what_arrives_while_it_waits_wakes_the_sender(waker, sender, redis, redis_app):
    waits = threading.Timer(redis_app.settings.wait_timeout / 4, redis.rpush, (LOW, "a"))
    waits.start()
    waker.tick(0.0)
    waits.join()

    assert sender._is_woken
    assert redis.lrange(HEAD, 0, -1) == [b"a"]


def test_where_nothing_arrives_the_machine_stays_idle(waker, idleness, sender):
    assert waker.tick(0.0) is None

    assert idleness.is_idle.is_set()
    assert not sender._is_woken


def test_a_machine_that_is_not_idle_asks_for_nothing(waker, idleness, sender, redis):
    idleness.is_idle.clear()
    redis.rpush(LOW, "a")
    assert waker.tick(0.0) is None

    assert redis.lrange(LOW, 0, -1) == [b"a"]
    assert not sender._is_woken


def test_what_nobody_here_has_room_for_goes_back_to_the_front(waker, idleness, sender, redis):
    idleness.has_room = False
    redis.rpush(LOW, "a", "b")
    assert waker.tick(0.0) is None

    assert redis.lrange(LOW, 0, -1) == [b"a", b"b"]
    assert redis.exists(HEAD) == 0
    assert not sender._is_woken


def test_what_another_supervisor_has_moved_stays_in_front(waker, idleness, redis):
    idleness.has_room = False
    redis.rpush(HEAD, "earlier")
    redis.rpush(LOW, "a")
    waker.tick(0.0)

    assert redis.lrange(HEAD, 0, -1) == [b"earlier"]
    assert redis.lrange(LOW, 0, -1) == [b"a"]


def test_a_key_of_a_wrong_type_holds_up_no_other_queue(make_waker, sender, redis):
    redis.set(LOW, "no list")
    redis.rpush("wakaq:high", "a")
    assert make_waker("low").tick(0.0) == REFUSED_PAUSE
    assert not sender._is_woken
    make_waker("high").tick(0.0)

    assert sender._is_woken


def test_a_key_of_a_wrong_type_is_told_once_a_minute(waker, redis, caplog, clock, monkeypatch):
    monkeypatch.setattr(connection, "time", clock)
    redis.set(LOW, "no list")
    for _ in range(3):
        waker.tick(0.0)
    assert caplog.text.count("Redis refuses: wakaq:low: WRONGTYPE") == 1
    clock.now += 60.0
    waker.tick(0.0)

    assert caplog.text.count("Redis refuses: wakaq:low: WRONGTYPE") == 2
