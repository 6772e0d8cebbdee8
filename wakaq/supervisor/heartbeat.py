"""Pings workers, and kills one whose interpreter has not answered for long while it runs nothing.

Not for tasks that take long: a worker that is silent while a task runs is reported, and left to its
hard timeout.
"""

import logging
from collections.abc import Callable, Iterable

from wakaq.channel import Ping
from wakaq.service import Outage, Service
from wakaq.supervisor.child import Child, Death

logger = logging.getLogger("wakaq.supervisor")
SILENCE = 30.0  # seconds


class Heartbeat(Service):
    """The thread that pings; `flush_later` has the dispatcher send what a socket did not take."""

    interval = 1.0

    def __init__(
        self,
        children: Callable[[], Iterable[Child]],
        flush_later: Callable[[Child], None],
        outage: Outage,
    ) -> None:
        super().__init__(outage)
        self._children = children
        self._flush_later = flush_later
        # This thread only.
        self._last_tick = self._resumed_at = 0.0
        # Any thread may read.
        self.silent: frozenset[Child] = frozenset()

    def tick(self, now: float) -> float | None:
        # After a pause of our own (SIGSTOP, a suspended machine) nobody could have answered: they
        # get their time anew.
        if now - self._last_tick > SILENCE / 2:
            self._resumed_at = now
        self._last_tick = now
        children = [child for child in self._children() if child.has_served]
        silent = {c for c in children if now - max(c.progress.pong_at, self._resumed_at) > SILENCE}
        for child in children:
            self._ping(child, now)
        for child in silent:
            running = child.describe_running()
            if not running:
                logger.error("%s does not answer and runs nothing: killing it", child)
                child.kill(Death("it did not answer"))
            elif child not in self.silent:
                logger.warning("%s does not answer while it runs %s", child, running)
        self.silent = frozenset(silent)
        return None

    def _ping(self, child: Child, now: float) -> None:
        # One ping at a time: what waits in front of it would only grow where the worker reads
        # nothing.
        if child.progress.pong_at > child.pinged_at and child.channel.is_flushed:
            child.pinged_at = now
            if not child.channel.send(Ping()):
                self._flush_later(child)
