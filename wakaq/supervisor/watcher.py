"""A connection on which the server waits until a queue has work. Not for a busy machine: there, the dispatcher claims.

No thread waits for the answer, but the dispatcher's selector: so a payload reaches an idle worker with one thread awake.
"""

import time
from collections.abc import Sequence
from selectors import EVENT_READ, BaseSelector

from wakaq.broker import Broker
from wakaq.client import OUTAGES, RedisError
from wakaq.queue import Queue
from wakaq.turn import Claim, Lane

LOOK_EVERY = 1.0  # seconds between looks whether a watcher should wait
REST = 5.0  # seconds until a queue that cannot be used is tried again


class Watcher:
    """Watches one queue (dispatcher thread only)."""

    def __init__(self, broker: Broker, queue: Queue) -> None:
        self._broker = broker
        self._connection = broker.connection()
        self._lane: Lane | None = None
        self.rests_until = 0.0
        self.deadline = 0.0  # when to give up waiting for the answer
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
        settings = self._broker.settings
        self.deadline = time.monotonic() + settings.wait_timeout + settings.socket_timeout

    def answer(self) -> Claim | None:
        """Return what was claimed; call it when the socket is readable, or has failed."""
        assert self._lane is not None
        lane, self._lane = self._lane, None
        try:
            payload = self._broker.end_claim(self._connection)
        except OUTAGES:
            raise
        except RedisError as error:  # such as WRONGTYPE: nothing was claimed
            self._broker.complain(f"{self._broker.keys.queue(self.queue)}: {error}")
            self.rests_until = time.monotonic() + REST
            return None
        return None if payload is None else Claim(lane, payload)

    def give_up(self) -> None:
        """Close a connection on which nothing answers; the claim that was asked for may still happen."""
        self._lane = None
        self._connection.disconnect()  # type: ignore[no-untyped-call]


class Watchers:
    """One watcher a queue, in their order (dispatcher thread only)."""

    def __init__(self, broker: Broker, queues: Sequence[Queue], selector: BaseSelector) -> None:
        self._watchers = [Watcher(broker, queue) for queue in queues]
        self._selector = selector

    @property
    def is_waiting(self) -> bool:
        """Whether the server owes an answer to one of them."""
        return any(watcher.is_waiting for watcher in self._watchers)

    def urgency(self, data: object) -> int:
        """Return the place of a watcher in the order of priority; anything else comes first."""
        return self._watchers.index(data) if isinstance(data, Watcher) else -1

    def watch(self, lanes: Sequence[Lane]) -> None:
        """Have the server wait for work in the queues that nobody waits for yet."""
        now = time.monotonic()
        for watcher, lane in zip(self._watchers, lanes, strict=True):
            if not watcher.is_waiting and now >= watcher.rests_until:
                watcher.ask(lane)
                self._selector.register(watcher.fd, EVENT_READ, watcher)

    def answer(self, watcher: Watcher) -> Claim | None:
        """Return what a watcher has claimed, whose socket is readable."""
        self._selector.unregister(watcher.fd)
        return watcher.answer()

    def drop_silent(self, now: float) -> bool:
        """Give up those that get no answer; returns whether there were any."""
        silent = [
            watcher for watcher in self._watchers if watcher.is_waiting and now > watcher.deadline
        ]
        for watcher in silent:
            self._selector.unregister(watcher.fd)
            watcher.give_up()
        return bool(silent)

    def next_look_at(self, now: float) -> float:
        """Return when one of them may need attention."""
        moments = (one.deadline if one.is_waiting else now + LOOK_EVERY for one in self._watchers)
        return min(moments, default=now + LOOK_EVERY)

    def settled(self, lanes: Sequence[Lane]) -> list[Lane]:
        """Return the lanes into which nothing is being claimed.

        In the others nobody can tell a stray from a claim that is on its way.
        """
        watched = zip(self._watchers, lanes, strict=True)
        return [lane for watcher, lane in watched if not watcher.is_waiting]
