"""Waits for work while workers are idle.

One thread a queue, since a blocking command is for one queue.

What arrives is moved to the queue's `head`, which all supervisors share, and nothing is claimed:
the next turn of anybody claims from there first. So a wake-up that is lost, late, or happens twice
loses nothing and needs no bookkeeping.
"""

import threading

from wakaq.queue import Queue
from wakaq.service import Outage, Service
from wakaq.store.broker import Broker
from wakaq.store.connection import RedisError, is_outage
from wakaq.supervisor.sender import Sender

REFUSED_PAUSE = 1.0  # seconds until a queue is watched again whose key has a wrong type


class Idleness:
    """Whether a slot group's queues were empty and workers had room, as the dispatcher knows."""

    def __init__(self) -> None:
        # Set by the dispatcher; cleared by it, and by a waker that has seen work arrive.
        self.is_idle = threading.Event()
        # Written by the dispatcher; wakers read it.
        self.has_room = False


class Waker(Service):
    """The thread for one queue."""

    interval = 0.0

    def __init__(
        self, broker: Broker, queue: Queue, idleness: Idleness, sender: Sender, outage: Outage
    ) -> None:
        super().__init__(outage, f"waker-{queue.name}")
        self._broker = broker
        self._queue = queue
        self._idleness = idleness
        self._sender = sender

    def tick(self, now: float) -> float | None:
        if not self._idleness.is_idle.wait(self._broker.settings.wait_timeout):
            return None
        try:
            has_work = self._broker.wait_for_work(self._queue)
        except RedisError as error:
            if is_outage(error):
                raise
            # Such as a key of a wrong type: it holds up this queue alone.
            self._broker.report_refusal(f"{self._broker.keys.of(self._queue).queue}: {error}")
            return REFUSED_PAUSE
        if has_work:
            if self._idleness.has_room:
                self._idleness.is_idle.clear()
                self._sender.wake()
            else:
                # Nobody here can run it, and others may be waiting for it.
                self._broker.put_head_back(self._queue)
        self._outage.end(now)
        return None
