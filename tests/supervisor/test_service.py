"""Threads around a tick, calls that are posted to a thread, and the one log of outages."""

import contextlib
import logging
import os
import selectors
import signal
import subprocess
import sys
import threading

import pytest
import redis as redis_py

from wakaq import service as service_module
from wakaq.scheduler import Scheduler
from wakaq.service import QUIET, Mailbox, Service
from wakaq.store.registry import Registry
from wakaq.supervisor.broadcast import Broadcast
from wakaq.supervisor.heartbeat import Heartbeat
from wakaq.supervisor.lease import Identity, Lease
from wakaq.supervisor.memory import Memory
from wakaq.supervisor.promoter import Promoter
from wakaq.supervisor.sender import Sender
from wakaq.supervisor.timeouts import Timeouts
from wakaq.supervisor.waker import Idleness, Waker

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


@pytest.fixture
def bad_log():
    """A handler that raises, as an application's own may, at whatever a service logs."""

    class Bad(logging.Handler):
        def handle(self, _record):
            raise OSError("the disk is full")

    handler = Bad()
    service_module.logger.addHandler(handler)
    yield
    service_module.logger.removeHandler(handler)


@pytest.mark.usefixtures("bad_log")
def test_a_log_that_raises_does_not_end_a_service(outage):
    service = Counter(outage)
    service.start()
    assert service.has_ticked.wait(5)
    service.stop()

    assert has_ended(service)


ENDS = """
from wakaq.log import configure, start_queue
from wakaq.service import crash, give_up
configure(20, None, "%(message)s", "%(message)s")
"""
CRASH = """
try:
    1 / 0
except ZeroDivisionError:
    crash("The dispatcher")
"""


@pytest.mark.parametrize("queue", ["", "start_queue()\n"])
@pytest.mark.parametrize("is_blocked", [False, True])
@pytest.mark.parametrize(
    ("end", "status", "text"),
    [
        (CRASH, 4, "The dispatcher failed: this is a bug in WakaQ\nTraceback"),
        ("give_up('Redis refuses', 5)", 5, "Redis refuses: stopping"),
    ],
)
def test_a_process_that_is_no_use_ends_also_where_its_log_blocks(
    queue, end, status, text, is_blocked
):
    reader, writer = os.pipe()
    try:
        if is_blocked:
            os.set_blocking(writer, False)
            for size in (4096, 1):
                with contextlib.suppress(BlockingIOError):
                    while True:
                        os.write(writer, b"x" * size)
            os.set_blocking(writer, True)
        command = [sys.executable, "-c", ENDS + queue + end]
        with subprocess.Popen(command, stderr=writer) as process:
            try:
                ended = process.wait(8)
            finally:
                process.kill()
        log = os.read(reader, 1 << 16).decode()
    finally:
        os.close(reader)
        os.close(writer)

    assert ended == status
    assert is_blocked or text in log


def make_services(app, outage):
    """Return what makes each of the real ones, by its name."""
    broker = app.broker
    (group,) = broker.groups
    queue = app.queues[0]
    sender = Sender(broker, lambda *_: None, outage, 1.0)
    identity = Identity(Registry(broker, group), "me", "", 0)
    return {
        "broadcast": lambda: Broadcast(broker, lambda _: None, outage),
        "heartbeat": lambda: Heartbeat(list, lambda _: None, outage),
        "lease": lambda: Lease(app, lambda: [identity], list, outage),
        "memory": lambda: Memory(list, lambda _: None, 99, outage),
        "promoter": lambda: Promoter(broker, group, outage),
        "scheduler": lambda: Scheduler(app, broker, lambda _: None, outage),
        "timeouts": lambda: Timeouts(list, outage),
        "waker-high": lambda: Waker(broker, queue, Idleness(), sender, outage),
    }


SERVICES = [
    *("broadcast", "heartbeat", "lease", "memory"),
    *("promoter", "scheduler", "timeouts", "waker-high"),
]


@pytest.mark.parametrize("name", SERVICES)
@pytest.mark.usefixtures("redis")
def test_each_service_is_started_and_stopped_fifty_times(make_app, app_url, outage, caplog, name):
    app = make_app(url=app_url, wait_timeout=0.01)
    services = make_services(app, outage)
    assert set(services) == set(SERVICES)
    for _ in range(50):
        service, has_begun = services[name](), threading.Event()

        def tick(now, tick=service.tick, has_begun=has_begun):
            has_begun.set()
            return tick(now)

        service.tick = tick
        service.start()
        assert has_begun.wait(5)
        service.stop()
        assert has_ended(service)
        assert service.name == f"wakaq-{name}"
        if name == "lease":
            service._broker.close()
    app.broker.close()

    assert caplog.messages == []


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
def clock(monkeypatch, clock):
    """The time of outages."""
    clock.now = 100.0
    monkeypatch.setattr(service_module, "time", clock)
    return clock


def test_an_outage_is_logged_once_when_it_begins_and_once_when_it_ends(outage, clock, caplog):
    outage.end(99.0)
    outage.begin(redis_py.ConnectionError("first"))
    clock.now = 112.3
    outage.begin(redis_py.ConnectionError("second"))
    assert caplog.messages == ["Redis is away, will go on trying: first"]
    for _ in range(2):
        outage.end(112.4 + QUIET)
    assert caplog.messages[1:] == ["Redis is back after 12.3 s"]
    outage.begin(redis_py.ConnectionError("third"))

    assert caplog.messages[2:] == ["Redis is away, will go on trying: third"]


def test_an_outage_lasts_until_the_first_success_that_no_failure_followed(outage, clock, caplog):
    outage.begin(redis_py.ConnectionError("lost"))
    clock.now = 101.0
    outage.end(100.5)
    clock.now = 102.0
    outage.begin(redis_py.ConnectionError("lost again"))
    outage.end(101.9)  # it was called before
    clock.now = 103.0
    outage.end(102.5)
    clock.now = 130.0
    outage.end(129.0)

    assert caplog.messages[1:] == ["Redis is back after 3.0 s"]


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
