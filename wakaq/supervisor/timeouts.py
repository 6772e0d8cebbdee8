"""Interrupts tasks past their soft timeout, and kills workers whose task ran past its hard one.

Decides, does not wait: `overdue` is pure, `Timeouts` is a thread around it. Soft timeouts of async
tasks are not here but in `wakaq.worker.async_runner`, which can cancel one task and spare the
others.
"""

import logging
import signal
from collections.abc import Callable, Iterable

from wakaq.service import Outage, Service
from wakaq.store.dead_letter import Reason
from wakaq.supervisor.child import Child, Death

logger = logging.getLogger("wakaq.supervisor")


def overdue(child: Child, now: float) -> tuple[int, float] | None:
    """Return row and hard deadline of a task past it, or None."""
    for row in (child.progress.row, *list(child.async_rows)):
        deadline = child.progress.hard_deadlines[row] if row >= 0 else 0.0
        if 0.0 < deadline <= now:
            return row, deadline
    return None


class Timeouts(Service):
    """The thread that enforces limits on running time."""

    interval = 0.05

    def __init__(self, children: Callable[[], Iterable[Child]], outage: Outage) -> None:
        super().__init__(outage)
        self._children = children
        # This thread only. Child -> the task that is to be killed with it, while the stacks are
        # being written.
        self._overdue: dict[Child, tuple[int, float]] = {}

    def tick(self, now: float) -> float | None:
        overdue_now: dict[Child, tuple[int, float]] = {}
        for child in self._children():
            if 0.0 < child.progress.soft_deadline <= now:
                # The worker's handler looks at the deadline again, so a signal that comes late hits
                # nothing.
                child.signal(signal.SIGUSR2)
            task = overdue(child, now)
            if task is None:
                continue
            if self._overdue.get(child) == task:
                self._kill(child, task, now)
            else:  # it has until the next tick to write its stacks
                child.ask_for_stacks()
                overdue_now[child] = task
        self._overdue = overdue_now
        return None

    def _kill(self, child: Child, task: tuple[int, float], now: float) -> None:
        row, deadline = task
        running = {one: (began, call) for one, began, call in child.running()}
        began, call = running.get(row, (now, "a task"))
        stacks = child.read_stacks()
        if overdue(child, now) != task:  # it ended just now
            return
        child.kill(Death(Reason.HARD_TIMEOUT, row, deadline, stacks))
        logger.error(
            "%s is killed: %s ran into its hard timeout after %.1f s. It was at:\n%s",
            *(child, call, now - began, stacks),
        )
