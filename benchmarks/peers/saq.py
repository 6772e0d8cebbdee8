"""SAQ: one event loop a process."""

from datetime import datetime
from typing import Any

from peers.common import PROCESSES, SLOTS, URL, async_work
from saq import Queue


async def work(_context: dict[str, Any], *, args: list[Any]) -> None:
    """Leave a mark."""
    await async_work(*args)


queue = Queue.from_url(URL)
settings = {"queue": queue, "functions": [work], "concurrency": SLOTS or 10}

COMMANDS = [["saq", "peers.saq.settings", "--workers", PROCESSES]]
KEYS = ["saq:default:incomplete"]


async def send(args: tuple[Any, ...], eta: datetime | None) -> None:
    """Enqueue one call. A negative ttl keeps no result."""
    # Documented as whole seconds; it takes fractions as well, and is the more punctual for it.
    scheduled = eta.timestamp() if eta else 0
    await queue.enqueue("work", args=list(args), ttl=-1, scheduled=scheduled)
