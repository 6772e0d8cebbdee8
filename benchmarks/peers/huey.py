"""Huey: worker processes, or 8 threads in one (variant `thread`)."""

from datetime import datetime
from typing import Any

from huey import RedisHuey
from peers.common import HOST, PORT, PROCESSES, VARIANT, work

app = RedisHuey("bench", host=HOST, port=PORT, results=False)
task = app.task(name="work")(work)

_KIND = ["-k", "thread", "-w", "8"] if VARIANT == "thread" else ["-k", "process", "-w", PROCESSES]
COMMANDS = [["huey_consumer", "peers.huey.app", *_KIND]]
KEYS = ["huey.redis.bench", "huey.schedule.bench"]


def send(args: tuple[Any, ...], eta: datetime | None) -> None:
    """Enqueue one call."""
    if eta:
        task.schedule(args=args, eta=eta)
    else:
        task(*args)
