"""Streaq: one event loop a process."""

from contextlib import AsyncExitStack
from datetime import datetime
from typing import Any

from peers.common import PROCESSES, SLOTS, URL, async_work
from streaq import Worker

worker = Worker(redis_url=URL, concurrency=SLOTS or 16)


@worker.task(name="work", ttl=0)
async def work(args: list[Any]) -> None:
    """Leave a mark."""
    await async_work(*args)


COMMANDS = [["streaq", "run", "peers.streaq:worker", "--workers", PROCESSES]]
KEYS = ["streaq:default:queues:*"]
_open = AsyncExitStack()
_is_open: list[bool] = []


async def send(args: tuple[Any, ...], eta: datetime | None) -> None:
    """Enqueue one call."""
    if not _is_open:
        await _open.enter_async_context(worker)
        _is_open.append(True)
    call = work.enqueue(list(args))
    await (call.start(schedule=eta) if eta else call)
