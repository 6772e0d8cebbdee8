"""Dramatiq: processes with 8 threads each."""

from datetime import UTC, datetime
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from peers.common import PROCESSES, URL, work

dramatiq.set_broker(RedisBroker(url=URL))
actor = dramatiq.actor(work)

COMMANDS = [["dramatiq", "peers.dramatiq", "-p", PROCESSES]]
KEYS = ["dramatiq:default", "dramatiq:default.msgs"]


def send(args: tuple[Any, ...], eta: datetime | None) -> None:
    """Enqueue one call."""
    if eta:
        delay = (eta - datetime.now(UTC)).total_seconds() * 1000
        actor.send_with_options(args=args, delay=max(0, int(delay)))
    else:
        actor.send(*args)
