"""What the supervisor's threads have in common: a tick, a mailbox, and one log of outages.

Not for what they do.
"""

import contextlib
import logging
import os
import queue as queues
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from wakaq.store.connection import LONGEST_BACKOFF, RedisError, backoff, is_outage

logger = logging.getLogger("wakaq.supervisor")

CRASHED = 4  # exit status: a bug of ours
REGISTRY_UNUSABLE = 5  # exit status: Redis refuses to have this supervisor registered
LAST_WORDS_WITHIN = 1.0  # seconds for the log to take why this process ends
QUIET = LONGEST_BACKOFF + 1.0  # seconds without a failure after which an outage is over


def crash(what: str) -> NoReturn:
    """End this process for a bug: its workers end what they run, and others rescue the rest."""
    _end("%s failed: this is a bug in WakaQ", what, CRASHED, sys.exception())


def give_up(reason: str, status: int) -> NoReturn:
    """End this process, which is no use any more, so that whoever supervises it starts it again."""
    _end("%s: stopping", reason, status)


def _end(text: str, what: str, status: int, error: BaseException | None = None) -> NoReturn:
    """End this process, also where the log takes nothing: it is written by a thread of its own."""

    def say() -> None:
        logger.critical(text, what, exc_info=error)
        logging.shutdown()

    try:
        thread = threading.Thread(target=say, name="wakaq-last-words", daemon=True)
        thread.start()
        thread.join(LAST_WORDS_WITHIN)
    finally:
        os._exit(status)


class Outage:
    """Tells the log once when Redis goes away and once when it is back, for all threads."""

    def __init__(self) -> None:
        # Any thread, under _lock.
        self._lock = threading.Lock()
        self._began_at: float | None = None
        self._failed_at = 0.0
        self._back_at: float | None = None  # the first success since

    def begin(self, error: Exception) -> None:
        """Note that a call has failed."""
        with self._lock:
            self._failed_at, self._back_at = time.monotonic(), None
            is_first = self._began_at is None
            if is_first:
                self._began_at = self._failed_at
        if is_first:
            logger.warning("Redis is away, will go on trying: %s", error)

    def end(self, called_at: float) -> None:
        """Note that a call that was made at `called_at` has succeeded."""
        with self._lock:
            began_at = self._began_at
            if began_at is None or called_at <= self._failed_at:
                return
            self._back_at = self._back_at or time.monotonic()
            # Not at the first success: a server may serve some calls and fail others, as when it is
            # full.
            if called_at <= self._failed_at + QUIET:
                return
            lasted, self._began_at = self._back_at - began_at, None
        logger.warning("Redis is back after %.1f s", lasted)


class Mailbox:
    """Calls that one thread is to make.

    Any thread posts them, a signal handler too; the owner waits on the descriptor.
    """

    def __init__(self) -> None:
        self._calls: queues.SimpleQueue[tuple[Callable[..., object], Any]] = queues.SimpleQueue()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)

    def fileno(self) -> int:
        return self._reader

    def is_empty(self) -> bool:
        return self._calls.empty()

    def post(self, call: Callable[..., object], *args: Any) -> None:
        self._calls.put((call, args))
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes as well
            os.write(self._writer, b"!")

    def work(self) -> None:
        """Make the calls that were posted until now (the owner)."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._reader, 4096)  # before the queue: what is posted later, wakes again
        while not self._calls.empty():
            call, args = self._calls.get()
            call(*args)


class Service(threading.Thread):
    """A supervised thread that calls `tick` until stopped.

    A tick that fails is logged, and the next one comes.

    Subclasses implement `tick`, which does one iteration and neither loops nor sleeps.
    """

    interval = 1.0
    longest_pause = LONGEST_BACKOFF  # seconds between ticks while Redis is away

    def __init__(self, outage: Outage, name: str = "") -> None:
        super().__init__(name=f"wakaq-{name or type(self).__name__.lower()}", daemon=True)
        self._outage = outage
        self._stopping = threading.Event()

    def tick(self, now: float) -> float | None:
        """Do one iteration at the monotonic time `now`.

        Returns the seconds until the next, None for `interval`.
        """
        raise NotImplementedError

    def stop(self) -> None:
        """Ask the thread to end, which it does after its tick."""
        self._stopping.set()

    def run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            now = time.monotonic()
            try:
                wait = self.tick(now)
                failures = 0
            # Broad: one bad tick, be it a bug or a key that someone overwrote, must not end the
            # thread that guards a fleet.
            except Exception as error:  # noqa: BLE001
                wait = max(self.interval, backoff(failures))
                with contextlib.suppress(Exception):  # of a log, which must not end it either
                    wait = self._fail(error, failures)
                failures += 1
            self._stopping.wait(self.interval if wait is None else wait)

    def _fail(self, error: Exception, failures: int) -> float:
        """Note that a tick has failed; return the seconds until the next."""
        if isinstance(error, RedisError) and is_outage(error):
            self._outage.begin(error)
            return min(backoff(failures), self.longest_pause)
        logger.error("%s failed, and will try again", self.name, exc_info=error)
        return max(self.interval, backoff(failures))
