"""Pings workers, and kills one whose interpreter has not answered for long while it runs nothing.

Not for tasks that take long: a worker that is silent while a task runs is reported, and left to its hard timeout.
"""

import logging
from collections.abc import Callable, Iterable

from wakaq.frames import Ping
from wakaq.supervisor.child import Child, Death
from wakaq.supervisor.service import Outage, Service

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
        # This thread only. Child -> since when it owes an answer, and whether it has been asked.
        self._asked: dict[Child, tuple[float, bool]] = {}
        self._last_tick = 0.0
        # Any thread may read.
        self.silent: frozenset[Child] = frozenset()

    def tick(self, now: float) -> float | None:
        # After a pause of our own (SIGSTOP, a suspended machine) nobody could have answered: they get their time anew.
        if now - self._last_tick > SILENCE / 2:
            self._asked.clear()
        self._last_tick = now
        children = [child for child in self._children() if child.is_ready]
        self._asked = {child: self._ask(child, now) for child in children}
        silent = frozenset(child for child in children if now - self._asked[child][0] > SILENCE)
        for child in silent:
            running = child.describe_running()
            if not running:
                logger.error("%s does not answer and runs nothing: killing it", child)
                child.kill(Death("it did not answer"))
            elif child not in self.silent:
                logger.warning("%s does not answer while it runs %s", child, running)
        self.silent = silent
        return None

    def _ask(self, child: Child, now: float) -> tuple[float, bool]:
        asked_at, is_sent = self._asked.get(child, (now, False))
        if is_sent and child.progress.pong_at >= asked_at:
            asked_at, is_sent = now, False
        # What waits in front of it would only grow where the worker reads nothing; but later it has to be asked, or it
        # could never answer.
        if not is_sent and child.channel.is_flushed:
            is_sent = True
            if not child.channel.send(Ping()):
                self._flush_later(child)
        return asked_at, is_sent
