"""Connections on which the server waits until a queue has work. Not for a busy machine: there, the dispatcher claims.

No thread waits for the answers, but the dispatcher's selector: so a payload reaches an idle worker with one thread awake.
Dispatcher thread only.
"""

import time
from collections.abc import Sequence
from selectors import EVENT_READ, BaseSelector
from socket import socket

from wakaq.broker import Broker
from wakaq.client import OUTAGES, RedisError, Wire
from wakaq.queue import Queue
from wakaq.turn import Claim, Lane

REST = 5.0  # seconds until a queue that cannot be used is tried again


class Watcher:
    """Watches one queue: while it is `lane`, the server owes an answer, and may claim into it."""

    def __init__(self, broker: Broker, queue: Queue, urgency: int) -> None:
        self.queue = queue
        self.urgency = urgency  # 0 for the queue that is served first
        self.wire = Wire(broker.client)
        self.sock: socket | None = None  # of the wire, as the selector knows it
        self.lane: Lane | None = None
        self.deadline = 0.0  # when to give up waiting
        self.rests_until = 0.0


class Watchers:
    """One watcher a queue, in their order."""

    def __init__(self, broker: Broker, queues: Sequence[Queue], selector: BaseSelector) -> None:
        self._broker = broker
        self._watchers = [Watcher(broker, queue, i) for i, queue in enumerate(queues)]
        self._selector = selector

    @property
    def is_waiting(self) -> bool:
        """Whether the server owes an answer to one of them."""
        return any(watcher.lane for watcher in self._watchers)

    def watch(self, lanes: Sequence[Lane], now: float) -> None:
        """Have the server wait for work in the queues that nobody waits for yet."""
        settings = self._broker.settings
        for watcher, lane in zip(self._watchers, lanes, strict=True):
            if watcher.lane is None and now >= watcher.rests_until:
                try:
                    self._broker.begin_claim(watcher.wire, lane)
                finally:
                    self._follow(watcher)
                watcher.lane = lane
                watcher.deadline = now + settings.wait_timeout + settings.socket_timeout

    def answer(self, watcher: Watcher) -> Claim | None:
        """Return what a watcher has claimed, whose socket is readable, or has failed."""
        lane, watcher.lane = watcher.lane, None
        try:
            if lane is None:  # nothing was asked: the server has closed the connection
                watcher.wire.close()
                return None
            payload = watcher.wire.receive()
        except OUTAGES:
            raise
        except RedisError as error:  # such as WRONGTYPE: nothing was claimed
            self._broker.complain(f"{self._broker.keys.of(watcher.queue).queue}: {error}")
            watcher.rests_until = time.monotonic() + REST
            return None
        finally:
            self._follow(watcher)
        return None if payload is None else Claim(lane, payload)

    def drop_silent(self, now: float) -> bool:
        """Give up those that get no answer, whose claim may still happen; returns whether there were any."""
        silent = [watcher for watcher in self._watchers if watcher.lane and now > watcher.deadline]
        for watcher in silent:
            watcher.lane = None
            watcher.wire.close()
            self._follow(watcher)
        return bool(silent)

    def settled(self, lanes: Sequence[Lane]) -> list[Lane]:
        """Return the lanes into which nothing is being claimed.

        In the others nobody can tell a stray from a claim that is on its way.
        """
        watched = zip(self._watchers, lanes, strict=True)
        return [lane for watcher, lane in watched if watcher.lane is None]

    def _follow(self, watcher: Watcher) -> None:
        """Have the selector know the wire's socket as it is now: its descriptor may be another's as soon as it is closed."""
        sock = watcher.wire.sock
        if sock is not watcher.sock:
            if watcher.sock is not None:
                self._selector.unregister(watcher.sock)
            watcher.sock = sock
            if sock is not None:
                self._selector.register(sock, EVENT_READ, watcher)
