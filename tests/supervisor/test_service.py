"""Threads around a tick, calls that are posted to a thread, and the one log of outages."""

import os
import selectors
import signal
import threading
from types import SimpleNamespace

import pytest
import redis as redis_py

from wakaq.service import QUIET, Mailbox, Outage, Service
from wakaq.supervisor import service as service_module


@pytest.fixture
def outage():
    return Outage()


# -- services --------------------------------------------------------------------------------------


class Counter(Service):
    interval = 0.0

    def __init__(self, outage):
        super().__init__(outage)
        self.ticks = 0
        self.has_ticked = threading.Event()

    def tick(self, _now):
        self.ticks += 1
        if self.ticks == 3:
            self.has_ticked.set()
        if self.ticks == 1:
            raise RuntimeError("one bad tick")


def has_ended(service, seconds=5):
    service.join(seconds)
    return not service.is_alive()


def test_a_service_survives_a_bad_tick_and_is_stopped_fifty_times(outage, caplog):
    for _ in range(50):
        service = Counter(outage)
        service.start()
        assert service.has_ticked.wait(5)
        service.stop()
        assert has_ended(service)

    assert caplog.text.count("wakaq-counter failed, and will try again") == 50


def test_a_service_whose_tick_goes_on_is_not_joined(outage):
    service = Counter(outage)
    begins, may_end = threading.Event(), threading.Event()

    def tick(_now):
        begins.set()
        assert may_end.wait(5)

    service.tick = tick
    service.start()
    assert begins.wait(5)
    service.stop()
    assert not has_ended(service, 0.0)
    may_end.set()

    assert has_ended(service)


def test_a_tick_without_redis_is_an_outage_and_the_next_one_comes(outage, caplog):
    service = Counter(outage)
    ticks, is_over = [], threading.Event()

    def tick(now):
        ticks.append(now)
        if len(ticks) <= 2:
            raise redis_py.ConnectionError("lost")
        is_over.set()

    service.tick = tick
    service.start()
    assert is_over.wait(5)
    service.stop()
    assert has_ended(service)

    assert caplog.text.count("Redis is away, will go on trying: lost") == 1
    assert "failed, and will try again" not in caplog.text


def test_a_tick_says_when_the_next_one_is_due(outage):
    service = Counter(outage)
    service.interval = 3_600.0
    ticks, is_over = [], threading.Event()

    def tick(now):
        ticks.append(now)
        if len(ticks) < 3:
            return 0.0
        is_over.set()
        return None

    service.tick = tick
    service.start()
    assert is_over.wait(5)
    service.stop()

    assert has_ended(service), "a service that waits for its next tick is not stopped"


# -- outages ---------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """The time of outages, as a list of one."""
    clock = [100.0]
    monkeypatch.setattr(service_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    return clock


def test_an_outage_is_logged_once_when_it_begins_and_once_when_it_ends(outage, clock, caplog):
    outage.end(99.0)
    outage.begin(redis_py.ConnectionError("first"))
    clock[0] = 112.3
    outage.begin(redis_py.ConnectionError("second"))
    assert caplog.messages == ["Redis is away, will go on trying: first"]
    for _ in range(2):
        outage.end(112.4 + QUIET)
    assert caplog.messages[1:] == ["Redis is back after 12.3 s"]
    outage.begin(redis_py.ConnectionError("third"))

    assert caplog.messages[2:] == ["Redis is away, will go on trying: third"]


@pytest.mark.usefixtures("clock")
def test_an_outage_goes_on_while_some_calls_succeed_and_others_fail(outage, caplog):
    outage.begin(redis_py.ConnectionError("lost"))
    outage.end(100.0 + QUIET)

    assert "Redis is back" not in caplog.text


# -- mailboxes -------------------------------------------------------------------------------------


@pytest.fixture
def mailbox():
    mailbox = Mailbox()
    yield mailbox
    os.close(mailbox._reader)
    os.close(mailbox._writer)


def is_readable(mailbox, timeout=0.0):
    with selectors.DefaultSelector() as selector:
        selector.register(mailbox, selectors.EVENT_READ)
        return bool(selector.select(timeout))


def test_calls_are_made_in_their_order_by_the_owner(mailbox):
    made = []
    assert mailbox.is_empty()
    mailbox.post(made.append, 1)
    mailbox.post(made.extend, (2, 3))
    mailbox.post(lambda *numbers: made.extend(numbers), 4, 5)
    assert made == []
    assert not mailbox.is_empty()
    mailbox.work()

    assert made == [1, 2, 3, 4, 5]
    assert mailbox.is_empty()
    assert not is_readable(mailbox)
    mailbox.work()
    assert made == [1, 2, 3, 4, 5]


def test_a_thread_that_posts_wakes_the_owner(mailbox):
    made = []
    thread = threading.Thread(target=mailbox.post, args=(made.append, "here"))
    assert not is_readable(mailbox)
    thread.start()
    assert is_readable(mailbox, timeout=5)
    thread.join()
    mailbox.work()

    assert made == ["here"]


def test_calls_that_post_wake_the_owner_again_or_are_made_at_once(mailbox):
    made = []
    mailbox.post(lambda: mailbox.post(made.append, "second"))
    mailbox.work()
    if not made:
        assert is_readable(mailbox)
        mailbox.work()

    assert made == ["second"]


def test_more_calls_than_the_pipe_holds_bytes_are_all_made(mailbox):
    made = []
    for number in range(100_000):
        mailbox.post(made.append, number)
    mailbox.work()

    assert made == list(range(100_000))


def test_signal_handlers_may_post_while_the_owner_works(mailbox):
    made, count = [], 200
    before = signal.signal(signal.SIGUSR1, lambda number, _: mailbox.post(made.append, number))
    try:
        for _ in range(count):
            mailbox.post(os.kill, os.getpid(), signal.SIGUSR1)
        while len(made) < count and is_readable(mailbox, timeout=5):
            mailbox.work()
    finally:
        signal.signal(signal.SIGUSR1, before)

    assert made == [signal.SIGUSR1] * count
