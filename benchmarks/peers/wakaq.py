"""WakaQ, this project's."""

import os
import socket
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from peers.common import PROCESSES, QUEUES, SLOTS, URL, async_work, work

from wakaq import Queue, WakaQ

if host := os.environ.get("BENCH_HOST"):
    socket.gethostname = lambda: host

app = WakaQ(
    queues=[Queue(f"work{number}", priority=number) for number in range(QUEUES)],
    url=URL,
    concurrency=PROCESSES,
    async_concurrency=SLOTS,
)
# Told how many async tasks may run at once, the benchmark is one of async tasks.
task = app.task(async_work if SLOTS else work)

if os.environ.get("BENCH_ALSO_ASYNC"):
    app.task(async_work)

COMMANDS = [["wakaq-worker", "--app=peers.wakaq.app"]]
KEYS = ["wakaq:work*", "wakaq:inflight:*", "wakaq:eta:*"]


def send(args: tuple[Any, ...], eta: datetime | None) -> None:
    """Enqueue one call."""
    if eta:
        task.delay(*args, eta=eta)
    elif QUEUES == 1:
        task.delay(*args)
    else:
        task.delay(*args, queue=f"work{args[0] % QUEUES}")


def bulk(calls: Iterable[tuple[Any, ...]]) -> None:
    """Enqueue many calls in few round trips."""
    with app.batch():
        for args in calls:
            send(args, None)
