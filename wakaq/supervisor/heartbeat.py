"""Pings workers, and kills one whose interpreter has not answered for long while it runs nothing.

Not for tasks that take long: a worker that is silent while a task runs is reported, and left to its hard timeout.
"""

import logging
from collections.abc import Callable, Iterable

from wakaq.frames import Ping
from wakaq.supervisor.autopsy import running_tasks
from wakaq.supervisor.child import Child, Death
from wakaq.supervisor.events import Blocked
from wakaq.supervisor.outage import Outage
from wakaq.supervisor.service import Service

logger = logging.getLogger("wakaq.supervisor")
SILENCE = 30.0  # seconds


class Heartbeat(Service):
    """The thread that pings."""

    name = "heartbeat"
    interval = 1.0

    def __init__(
        self,
        children: Callable[[], Iterable[Child]],
        post: Callable[[Blocked], None],
        outage: Outage,
    ) -> None:
        super().__init__(outage)
        self._children = children
        self._post = post
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
        silent = frozenset(child for child in children if self._is_silent(child, now))
        for child in silent:
            self._handle_silent(child, is_news=child not in self.silent)
        self.silent = silent
        self._asked = {child: asked for child, asked in self._asked.items() if child in children}
        return None

    def _is_silent(self, child: Child, now: float) -> bool:
        asked_at, is_sent = self._asked.get(child, (now, False))
        if is_sent and child.progress.pong_at >= asked_at:
            asked_at, is_sent = now, False
        # What waits in front of it would only grow where the worker reads nothing; but later it has to be asked, or it
        # could never answer.
        if not is_sent and child.channel.is_flushed:
            is_sent = True
            if not child.channel.send(Ping()):
                self._post(Blocked(child))
        self._asked[child] = asked_at, is_sent
        return now - asked_at > SILENCE

    def _handle_silent(self, child: Child, *, is_news: bool) -> None:
        if running := running_tasks(child):
            if is_news:
                names = ", ".join(name for _, name in running)
                logger.warning(
                    "Worker %d (pid %d) does not answer while it runs %s",
                    child.number,
                    child.pid,
                    names,
                )
        else:
            logger.error(
                "Worker %d (pid %d) does not answer and runs nothing: killing it",
                child.number,
                child.pid,
            )
            child.kill(Death("it did not answer"))
