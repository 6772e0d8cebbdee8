"""Taskiq with taskiq-redis: its list broker, or its stream broker (variant `stream`)."""

from datetime import datetime
from typing import Any

from peers.common import PROCESSES, SLOTS, URL, VARIANT, async_work
from taskiq import TaskiqScheduler
from taskiq_redis import ListQueueBroker, ListRedisScheduleSource, RedisStreamBroker

broker = RedisStreamBroker(URL) if VARIANT == "stream" else ListQueueBroker(URL)
source = ListRedisScheduleSource(URL)
scheduler = TaskiqScheduler(broker, [source])
task = broker.task(task_name="work")(async_work)

_SLOTS = ["--max-async-tasks", str(SLOTS)] if SLOTS else []
COMMANDS = [["taskiq", "worker", "peers.taskiq:broker", "-w", PROCESSES, *_SLOTS]]
# By default it looks for new delayed tasks once a minute only.
SCHEDULERS = [["taskiq", "scheduler", "peers.taskiq:scheduler", "--update-interval", "1"]]
KEYS = ["taskiq"]
_is_open: list[bool] = []


async def send(args: tuple[Any, ...], eta: datetime | None) -> None:
    """Enqueue one call."""
    if not _is_open:
        await broker.startup()
        _is_open.append(True)
    if eta:
        await task.schedule_by_time(source, eta, *args)
    else:
        await task.kiq(*args)
