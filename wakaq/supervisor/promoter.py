"""Moves delayed payloads to their queues when they are due.

Any number of supervisors may do so at once.
"""

import time

from wakaq.service import Outage, Service
from wakaq.store.broker import Broker
from wakaq.store.keys import SlotGroup

MOST = 1_000  # payloads in one call


class Promoter(Service):
    """The thread that promotes the delayed payloads of one slot group."""

    def __init__(self, broker: Broker, group: SlotGroup, outage: Outage) -> None:
        super().__init__(outage)
        self._broker = broker
        self._group = group

    def tick(self, now: float) -> float | None:
        moved, next_due = self._broker.promote(self._group, MOST)
        self._outage.end(now)
        if moved == MOST:
            return 0.0
        # `next_due` was true when the server answered: the way back counts.
        wait = max(0.0, next_due - (time.monotonic() - now) / 2)
        return min(wait, self._broker.settings.wait_timeout)
