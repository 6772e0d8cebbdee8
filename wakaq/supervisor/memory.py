"""Recycles the worker that takes the most memory when the machine, or the container, has too little left.

Not for leaks that stay small: `max_tasks_per_worker` is for those. The only module that knows psutil.
"""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

from wakaq.supervisor.autopsy import running_tasks
from wakaq.supervisor.child import Child, Death
from wakaq.supervisor.events import Retire
from wakaq.supervisor.outage import Outage
from wakaq.supervisor.service import Service

logger = logging.getLogger("wakaq.supervisor")
GRACE = 10.0  # seconds that the victim has to end its task
CGROUP = Path("/sys/fs/cgroup")


def used_percent(cgroup: Path = CGROUP) -> float:
    """Return how much of its memory the machine uses, or the cgroup of its limit, whichever is nearer to the end."""
    memory = psutil.virtual_memory()
    percents = [100.0 * (memory.total - memory.available) / memory.total]
    for usage, limit, cache in (
        ("memory.current", "memory.max", "memory.stat"),
        ("memory/memory.usage_in_bytes", "memory/memory.limit_in_bytes", "memory/memory.stat"),
    ):
        try:
            used, most = int((cgroup / usage).read_text()), int((cgroup / limit).read_text())
            stats = dict(line.split() for line in (cgroup / cache).read_text().splitlines())
        except (OSError, ValueError):  # no such cgroup, or no limit: "max"
            continue
        # What the kernel can drop at once counts as free, as it does in the machine's `available`.
        used -= int(stats.get("total_inactive_file", stats.get("inactive_file", 0)))
        if 0 < most < memory.total:
            percents.append(100.0 * used / most)
    return max(percents)


def rss(child: Child) -> int:
    """Return a worker's resident memory in bytes; 0 if it is gone."""
    try:
        return int(psutil.Process(child.pid).memory_info().rss)
    except psutil.Error:
        return 0


class Memory(Service):
    """The thread that watches memory; one victim at a time."""

    name = "memory"
    interval = 1.0

    def __init__(
        self,
        children: Callable[[], Iterable[Child]],
        post: Callable[[Retire], None],
        limit: float,
        outage: Outage,
        measure: Callable[[], float] = used_percent,
    ) -> None:
        super().__init__(outage)
        self._children = children
        self._post = post
        self._limit = limit
        self._measure = measure
        # Read by the main thread, which starts no workers meanwhile.
        self.is_exceeded = False
        # This thread only.
        self._victim: Child | None = None
        self._condemned_at = 0.0

    def tick(self, now: float) -> float | None:
        percent = self._measure()
        self.is_exceeded = percent >= self._limit
        children = list(self._children())
        if self._victim not in children:
            self._victim = None
        if not self.is_exceeded or not children:
            return None
        if self._victim is None:
            self._victim, self._condemned_at = max(children, key=rss), now
            self._report(self._victim, percent, "is asked to stop after its task")
            self._post(Retire(self._victim))
        elif now - self._condemned_at >= GRACE:
            self._report(self._victim, percent, "is killed")
            self._victim.kill(Death("it took too much memory"))
        return None

    def _report(self, victim: Child, percent: float, verdict: str) -> None:
        names = ", ".join(name for _, name in running_tasks(victim)) or "nothing"
        logger.warning(
            "Memory is used to %.0f %%, the limit is %.0f %%: worker %d (pid %d, %d MB), running %s, %s",
            percent,
            self._limit,
            victim.number,
            victim.pid,
            rss(victim) // 1_000_000,
            names,
            verdict,
        )
