"""A broker that keeps what it is given, and an application that has it.

It is set where applications may set their own.
"""

import pytest

from wakaq import Queue, WakaQ
from wakaq.message import Call


class Recorder:
    """Keeps every call it is asked to send."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.trips: list[str] = []
        self.broadcasts: list[bytes] = []

    def enqueue(self, queue: Queue, payload: bytes) -> None:
        self.trips.append("enqueue")
        self.calls.append(Call(queue, payload))

    def enqueue_all(self, calls: list[Call]) -> None:
        self.trips.append("enqueue_all")
        self.calls += calls

    async def aenqueue_all(self, calls: list[Call]) -> None:
        self.trips.append("aenqueue_all")
        self.calls += calls

    def publish(self, payload: bytes) -> int:
        self.broadcasts.append(payload)
        return 3


@pytest.fixture
def broker() -> Recorder:
    return Recorder()


@pytest.fixture
def app(broker) -> WakaQ:
    app = WakaQ(queues=[(0, "payments"), (1, "emails"), "reports"])
    app.broker = broker
    return app


@pytest.fixture
def synchronous() -> WakaQ:
    return WakaQ(queues=["default"], synchronous_mode=True)
