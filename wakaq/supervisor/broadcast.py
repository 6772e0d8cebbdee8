"""Listens for broadcasts, and hands each to the dispatcher, which has one of the workers run it.

Not for choosing that worker.
"""

from collections.abc import Callable
from typing import Any

from wakaq.service import Outage, Service
from wakaq.store.broker import Broker


class Broadcast(Service):
    """The thread that listens.

    What is published while Redis is away reaches nobody, as pub/sub has it.
    """

    interval = 0.0

    def __init__(self, broker: Broker, hand_over: Callable[[bytes], None], outage: Outage) -> None:
        super().__init__(outage)
        self._broker = broker
        self._hand_over = hand_over
        self._subscription: Any = None

    def tick(self, now: float) -> float | None:
        del now
        try:
            if self._subscription is None:
                self._subscription = self._broker.subscribe()
            message = self._subscription.get_message(timeout=self._broker.settings.wait_timeout)
            if self._subscription.health_check_response_counter > 1:
                # A ping of `health_check_interval` ago has no answer: nothing may come over a
                # connection that looks open.
                self._subscription.close()
                self._subscription = None
        except BaseException:
            self._subscription = None  # the next tick subscribes anew
            raise
        if message is not None:
            self._hand_over(message["data"])
        return None
