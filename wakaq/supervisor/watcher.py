"""Blocks for new work in one queue while some worker is idle, and claims it. Not for a busy machine: see `dispatcher`."""

from collections.abc import Callable

from wakaq.broker import OUTAGES, Broker
from wakaq.queue import Queue
from wakaq.supervisor.dispatcher import Dispatcher
from wakaq.supervisor.events import Arrived, Doubt
from wakaq.supervisor.outage import Outage
from wakaq.supervisor.service import Service
from wakaq.turn import Claim


class Watcher(Service):
    """The thread that watches one queue."""

    interval = 0.0

    def __init__(
        self,
        broker: Broker,
        queue: Queue,
        dispatcher: Dispatcher,
        outage: Outage,
        holds_lease: Callable[[], bool],
    ) -> None:
        self.name = f"watcher-{queue.name}"
        super().__init__(outage)
        self._broker = broker
        self._queue = queue
        self._dispatcher = dispatcher
        self._holds_lease = holds_lease

    def tick(self, now: float) -> float | None:
        del now
        dispatcher = self._dispatcher
        if not dispatcher.wanted.wait(self._broker.settings.wait_timeout):
            return None
        # Before the second look at `wanted`: once it is cleared, whoever is not in here claims nothing.
        dispatcher.claiming.add(self)
        try:
            if not dispatcher.wanted.is_set():
                return None
            # A supervisor that was stopped for longer than its lease may have been declared dead: what it claimed then
            # would be nobody's.
            if not self._holds_lease():
                return self._broker.settings.wait_timeout
            lane = self._broker.lane(self._queue, dispatcher.ledger.worker_id, 0)
            try:
                payload = self._broker.wait_and_claim(lane)
            except OUTAGES:
                dispatcher.post(Doubt())
                raise
            if payload is not None:
                dispatcher.post(Arrived(Claim(lane, payload)))
        finally:
            dispatcher.claiming.discard(self)
        return None
