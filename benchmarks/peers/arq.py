"""Arq: one event loop a process."""

from datetime import datetime
from typing import Any, ClassVar

from arq import create_pool
from arq.connections import ArqRedis, RedisSettings
from peers.common import HOST, PORT, PROCESSES, SLOTS, async_work


async def work(_context: dict[str, Any], *args: Any) -> None:
    """Leave a mark."""
    await async_work(*args)


class Settings:
    """The worker's settings."""

    functions: ClassVar = [work]
    redis_settings = RedisSettings(host=HOST, port=PORT)
    keep_result = 0
    max_jobs = SLOTS or 10


COMMANDS = [["arq", "peers.arq.Settings"]] * int(PROCESSES)
KEYS = ["arq:queue"]
_pool: list[ArqRedis] = []


async def send(args: tuple[Any, ...], eta: datetime | None) -> None:
    """Enqueue one call."""
    if not _pool:
        _pool.append(await create_pool(Settings.redis_settings))
    await _pool[0].enqueue_job("work", *args, _defer_until=eta)
