"""Celery, prefork pool."""

from datetime import datetime
from typing import Any

from celery import Celery
from peers.common import PROCESSES, URL, work

app = Celery("bench", broker=URL)
app.conf.task_ignore_result = True
app.conf.broker_connection_retry_on_startup = True
task = app.task(work, name="work")

COMMANDS = [["celery", "-A", "peers.celery", "worker", "-c", PROCESSES]]
KEYS = ["celery", "unacked"]


def send(args: tuple[Any, ...], eta: datetime | None) -> None:
    """Enqueue one call."""
    if eta:
        task.apply_async(args, eta=eta)
    else:
        task.delay(*args)
