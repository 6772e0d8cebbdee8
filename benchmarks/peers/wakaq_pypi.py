"""The WakaQ packages on PyPI, 2.1.25 and 3.0.7.

What is popped and not finished is lost with its worker.
"""

from datetime import UTC, datetime
from typing import Any

from peers.common import HOST, PORT, PROCESSES, work

from wakaq import WakaQ

app = WakaQ(queues=["work"], host=HOST, port=PORT, concurrency=PROCESSES)
task = app.task(work)

COMMANDS = [["wakaq-worker", "--app=peers.wakaq_pypi.app"]]
KEYS = ["wakaq:work"]


def send(args: tuple[Any, ...], eta: datetime | None) -> None:
    """Enqueue one call."""
    if eta:
        task.delay(*args, eta=eta.astimezone(UTC).replace(tzinfo=None))
    else:
        task.delay(*args)
