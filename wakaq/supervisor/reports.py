"""Says what workers do, and how they ended. Not for what becomes of their tasks: that is `autopsy`."""

import logging
import signal
import time
from collections.abc import Collection
from typing import Any

from wakaq.supervisor.autopsy import running_tasks
from wakaq.supervisor.child import Child
from wakaq.supervisor.memory import rss

logger = logging.getLogger("wakaq.supervisor")
_LOST_STATUS = 255  # what multiprocessing tells when the fork server, which knew, is gone


def cause(status: int | None) -> str:
    """Return an exit status as people say it."""
    if status is None or status == _LOST_STATUS:
        return "ended, nobody knows how"
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        return f"was killed by {name}"
    return f"exited with status {status}"


def report_death(child: Child, status: int | None, victims: list[str]) -> None:
    """Log a worker's end: pid, cause, what it was running, how long it lived, its memory."""
    death = child.death
    level = logging.WARNING if status or victims else logging.INFO
    logger.log(
        level,
        "Worker %d (pid %d) %s after %.1f s%s%s%s",
        child.number,
        child.pid,
        cause(status),
        time.monotonic() - child.spawned_at,
        f", by us, because of: {death.reason}" if death else "",
        f", while it ran {', '.join(victims)}" if victims else "",
        f", last seen with {child.rss // 1_000_000} MB" if child.rss else "",
    )


def describe(children: Collection[Child], silent: Collection[Child]) -> list[dict[str, Any]]:
    """Return what workers do, as the registry holds it."""
    now = time.monotonic()
    for child in children:
        child.rss = rss(child)
    return [
        {
            "number": child.number,
            "pid": child.pid,
            "rss": child.rss,
            "is_silent": child in silent,
            "tasks": [
                {"name": name, "seconds": round(now - child.started_at(slot), 1)}
                for slot, name in running_tasks(child)
            ],
        }
        for child in children
    ]
