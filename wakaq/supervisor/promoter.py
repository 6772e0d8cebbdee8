"""Moves delayed payloads to their queues when they are due; any number of supervisors may do so at once."""

import time

from wakaq.broker import Broker
from wakaq.supervisor.service import Outage, Service

MOST = 1_000  # payloads in one call


class Promoter(Service):
    """The thread that promotes."""

    def __init__(self, broker: Broker, outage: Outage) -> None:
        super().__init__(outage)
        self._broker = broker

    def tick(self, now: float) -> float | None:
        moved, next_due = self._broker.promote(MOST)
        self._outage.end(now)
        if moved == MOST:
            return 0.0
        # `next_due` was true when the server answered: the way back counts.
        wait = max(0.0, next_due - (time.monotonic() - now) / 2)
        return min(wait, self._broker.settings.wait_timeout)
