"""Recycles the worker that takes the most memory when the machine or container is short of it.

Not for leaks that stay small: `max_tasks_per_worker` is for those. The only module that knows
psutil.
"""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

from wakaq.service import Outage, Service
from wakaq.supervisor.child import Child, Death

logger = logging.getLogger("wakaq.supervisor")
GRACE = 10.0  # seconds that the victim has to end its task
CGROUP = Path("/sys/fs/cgroup")


def used_percent(cgroup: Path = CGROUP) -> float:
    """Return how much of its memory the machine uses, or the cgroup (v2) of its limit.

    Whichever is nearer to the end.
    """
    memory = psutil.virtual_memory()
    percent = 100.0 * (memory.total - memory.available) / memory.total
    try:
        used, most = (int((cgroup / f"memory.{name}").read_text()) for name in ("current", "max"))
        stats = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such cgroup, or no limit: "max"
        return percent
    # What the kernel can drop at once counts as free, as it does in the machine's `available`.
    used -= int(stats.get("inactive_file", 0))
    return max(percent, 100.0 * used / most)


def rss(child: Child) -> int:
    """Return a worker's resident memory in bytes; 0 if it is gone."""
    try:
        return int(psutil.Process(child.pid).memory_info().rss)
    except psutil.Error:
        return 0


class Memory(Service):
    """The thread that watches memory; one victim at a time."""

    interval = 1.0

    def __init__(
        self,
        children: Callable[[], Iterable[Child]],
        retire: Callable[[Child], None],
        limit: float,
        outage: Outage,
        measure: Callable[[], float] = used_percent,
    ) -> None:
        super().__init__(outage)
        self._children = children
        self._retire = retire
        self._limit = limit
        self._measure = measure
        # Read by the main thread, which starts no workers meanwhile.
        self.is_exceeded = False
        # This thread only.
        self._victim: Child | None = None
        self._overdue_at = 0.0

    def tick(self, now: float) -> float | None:
        percent = self._measure()
        self.is_exceeded = percent >= self._limit
        children = list(self._children())
        if self._victim not in children:
            self._victim = None
        if not self.is_exceeded or not children:
            return None
        if self._victim is None:
            self._victim, self._overdue_at = max(children, key=rss), now
            self._report(self._victim, percent, "is asked to stop after its task")
            self._retire(self._victim)
        elif now - self._overdue_at >= GRACE:
            self._report(self._victim, percent, "is killed")
            self._victim.kill(Death("it took too much memory"))
        return None

    def _report(self, victim: Child, percent: float, what: str) -> None:
        logger.warning(
            "Memory is used to %.0f %%, the limit is %.0f %%: %s, %d MB, running %s, %s",
            *(percent, self._limit, victim, rss(victim) // 1_000_000),
            *(victim.describe_running() or "nothing", what),
        )
