"""What all peers share.

Where Redis is, and the task that leaves its mark in a file that the driver watches.

Nothing but the standard library: it runs in every peer's own environment. A mark costs a task about
0.2 microseconds and Redis nothing, so counting does not tax whoever is being counted.
"""

import asyncio
import mmap
import os
import time
from pathlib import Path

HOST = "127.0.0.1"
PORT = int(os.environ["BENCH_PORT"])
URL = f"redis://{HOST}:{PORT}/0"
VARIANT = os.environ["BENCH_VARIANT"]
PROCESSES = os.environ["BENCH_PROCESSES"]
# How many async tasks at once in a process; empty: the peer's default.
SLOTS = int(os.environ["BENCH_SLOTS"] or 0)
QUEUES = int(os.environ["BENCH_QUEUES"])

_STAMP = 8


def _open_marks() -> tuple[memoryview, memoryview]:
    with Path(os.environ["BENCH_MARKS"]).open("r+b") as file:
        view = memoryview(mmap.mmap(file.fileno(), 0))
    capacity = len(view) // (_STAMP + 1)
    return view[: capacity * _STAMP].cast("d"), view[capacity * _STAMP :]


stamps, runs = _open_marks()


def work(number: int, seconds: float = 0, _text: str = "") -> None:
    """Note when task `number` started, sleep, count that it ran."""
    stamps[number] = time.monotonic()
    if seconds:
        time.sleep(seconds)
    runs[number] += 1


async def async_work(number: int, seconds: float = 0, _text: str = "") -> None:
    """Do as `work` does, asleep on the event loop."""
    stamps[number] = time.monotonic()
    if seconds:
        await asyncio.sleep(seconds)
    runs[number] += 1
