"""Interrupts tasks past their soft timeout, and kills workers whose task ran past its hard one.

Decides, does not wait: `overdue` is pure, `Timeouts` is a thread around it. Soft timeouts of async tasks are not here but
in `wakaq.worker.async_runner`, which can cancel one task and spare the others.
"""

import logging
import signal
from collections.abc import Callable, Iterable

from wakaq.letters import HARD_TIMEOUT
from wakaq.supervisor.child import Child, Death
from wakaq.supervisor.service import Outage, Service

logger = logging.getLogger("wakaq.supervisor")


def overdue(child: Child, now: float) -> tuple[int, float] | None:
    """Return slot and hard deadline of a task past it, or None."""
    for slot in (child.progress.slot, *list(child.async_slots)):
        deadline = child.progress.hard_deadlines[slot] if slot >= 0 else 0.0
        if 0.0 < deadline <= now:
            return slot, deadline
    return None


class Timeouts(Service):
    """The thread that enforces limits on running time."""

    interval = 0.05

    def __init__(self, children: Callable[[], Iterable[Child]], outage: Outage) -> None:
        super().__init__(outage)
        self._children = children
        # This thread only. Child -> the task that is to be killed with it, while the stacks are being written.
        self._condemned: dict[Child, tuple[int, float]] = {}

    def tick(self, now: float) -> float | None:
        condemned: dict[Child, tuple[int, float]] = {}
        for child in self._children():
            if 0.0 < child.progress.soft_deadline <= now:
                # The worker's handler looks at the deadline again, so a signal that comes late hits nothing.
                child.signal(signal.SIGUSR2)
            task = overdue(child, now)
            if task is None:
                continue
            if self._condemned.get(child) == task:
                self._kill(child, task, now)
            else:  # it has until the next tick to write its stacks
                child.ask_for_stacks()
                condemned[child] = task
        self._condemned = condemned
        return None

    def _kill(self, child: Child, task: tuple[int, float], now: float) -> None:
        slot, deadline = task
        running = {one: (began, call) for one, began, call in child.running()}
        began, call = running.get(slot, (now, "a task"))
        stacks = child.read_stacks()
        if overdue(child, now) != task:  # it ended just now
            return
        logger.error(
            "%s is killed: %s ran into its hard timeout after %.1f s. It was at:\n%s",
            *(child, call, now - began, stacks),
        )
        child.kill(Death(HARD_TIMEOUT, slot, deadline, stacks))
