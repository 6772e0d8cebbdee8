"""RQ.

The default worker, which forks for each job, and SimpleWorker, which does not (variant `simple`).
"""

from datetime import datetime
from typing import Any

from peers.common import PORT, PROCESSES, URL, VARIANT, work
from redis import Redis
from rq import Queue

queue = Queue(connection=Redis(port=PORT))

_CLASS = ["-w", "rq.worker.SimpleWorker"] if VARIANT == "simple" else []
# One of the workers is also the scheduler that delayed jobs need.
COMMANDS = [["rq", "worker", "--url", URL, "--with-scheduler", *_CLASS]] * int(PROCESSES)
KEYS = ["rq:queue:default", "rq:wip:default"]


def send(args: tuple[Any, ...], eta: datetime | None) -> None:
    """Enqueue one call."""
    if eta:
        queue.enqueue_at(eta, work, *args, result_ttl=0)
    else:
        queue.enqueue(work, *args, result_ttl=0)
