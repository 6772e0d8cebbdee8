"""Threads around a tick."""

import threading

import pytest

from wakaq.supervisor.outage import Outage
from wakaq.supervisor.service import Service


@pytest.fixture
def outage():
    return Outage()


class Counter(Service):
    name = "counter"
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


def test_a_service_survives_a_bad_tick_and_is_stopped_fifty_times(outage, caplog):
    for _ in range(50):
        service = Counter(outage)
        service.start()
        assert service.has_ticked.wait(5)
        service.stop()
        assert service.join(5)

    assert caplog.text.count("wakaq-counter failed, and will try again") == 50


def test_a_service_that_was_not_started_is_joined_at_once(outage):
    assert Counter(outage).join(5)
