"""Tells the log once when Redis goes away and once when it is back, for all threads of a process together."""

import logging
import threading
import time

from wakaq.client import LONGEST_BACKOFF

logger = logging.getLogger("wakaq.broker")
QUIET = LONGEST_BACKOFF + 1.0  # seconds without a failure after which an outage is over


class Outage:
    """The state of one process's connection to Redis; safe to use from any thread."""

    def __init__(self) -> None:
        # Any thread, under _lock.
        self._lock = threading.Lock()
        self._began_at: float | None = None
        self._failed_at = 0.0

    def begin(self, error: Exception) -> None:
        """Note that a call has failed."""
        with self._lock:
            self._failed_at = time.monotonic()
            if self._began_at is None:
                self._began_at = self._failed_at
                logger.warning("Redis is away, will go on trying: %s", error)

    def end(self, called_at: float) -> None:
        """Note that a call that was made at `called_at` has succeeded."""
        with self._lock:
            # Not at the first success: a server may serve some calls and fail others, as when it is out of memory.
            if self._began_at is not None and called_at > self._failed_at + QUIET:
                lasted, self._began_at = self._failed_at - self._began_at, None
                logger.warning("Redis is back after %.1f s", lasted)
