"""The application that the chaos suite runs: each task notes its start and its end in a file.

Written as a module, so that it is linted; the suite copies it into a folder of its own.
"""

import asyncio
import os
import time

import wakaq.worker.orphan
from wakaq import Queue, WakaQ

wakaq.worker.orphan.BEAT = 0.5  # the lease of the suite is shorter, too
MARKS = os.environ["CHAOS_MARKS"]
MEMORY = os.environ["CHAOS_MEMORY"]  # a folder: what has failed once
COUNTS = os.open(f"{MEMORY}/counts", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
SLOT = os.environ.get("CHAOS_SLOT", "-")

wakaq = WakaQ(
    queues=[Queue("high", priority=0), Queue("low", priority=1)],
    concurrency=2,
    url=os.environ["REDIS_URL"],
    max_redeliveries=1000,
    max_retries=1000,
    retry_on=ConnectionError,
    wait_timeout=0.3,
    socket_timeout=2,
    socket_connect_timeout=2,
    shutdown_timeout=5,
)


def note(what, number):
    line = f"{what} {number} {SLOT} {os.getpid()} {time.monotonic():.3f}\n"
    file = os.open(MARKS, os.O_WRONLY | os.O_APPEND)
    os.write(file, line.encode())
    os.close(file)


@wakaq.task
def count(number):
    os.write(COUNTS, b"%d\n" % number)


@wakaq.task
def work(number, seconds):
    note("start", number)
    time.sleep(seconds)
    note("end", number)


@wakaq.task
async def wait(number, seconds):
    note("start", number)
    await asyncio.sleep(seconds)
    note("end", number)


@wakaq.task
def same():
    note("start", "same")
    time.sleep(0.002)
    note("end", "same")


@wakaq.task
def flaky(number):
    note("start", number)
    try:
        os.close(os.open(f"{MEMORY}/{number}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        note("end", number)
    else:
        raise ConnectionError("as it happens")


@wakaq.task
def doomed(number):
    note("start", number)
    raise ValueError("as always")


@wakaq.task(hard_timeout=1)
def stuck(number):
    note("start", number)
    time.sleep(3600)
