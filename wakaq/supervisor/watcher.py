"""A connection on which the server waits until a queue has work. Not for a busy machine: there, the dispatcher claims.

No thread waits for the answer, but the dispatcher's selector: so a payload reaches an idle worker with one thread awake.
"""

from wakaq.broker import Broker
from wakaq.queue import Queue
from wakaq.turn import Claim, Lane


class Watcher:
    """Watches one queue (dispatcher thread only)."""

    def __init__(self, broker: Broker, queue: Queue) -> None:
        self._broker = broker
        self._connection = broker.connection()
        self._lane: Lane | None = None
        self.queue = queue
        self.fd = -1

    @property
    def is_waiting(self) -> bool:
        """Whether the server owes an answer, and so may claim."""
        return self._lane is not None

    def ask(self, lane: Lane) -> None:
        """Have the server claim the next payload into this lane, if one comes within `wait_timeout`."""
        self.fd = self._broker.begin_claim(self._connection, lane)
        self._lane = lane

    def answer(self) -> Claim | None:
        """Return what was claimed; call it when the socket is readable, or has failed."""
        assert self._lane is not None
        lane, self._lane = self._lane, None
        payload = self._broker.end_claim(self._connection)
        return None if payload is None else Claim(lane, payload)
