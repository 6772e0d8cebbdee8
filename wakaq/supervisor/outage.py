"""Tells the log once when Redis goes away and once when it is back, for all threads of a process together."""

import logging
import threading
import time

logger = logging.getLogger("wakaq.broker")


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
            if self._began_at is not None and called_at > self._failed_at:
                lasted, self._began_at = time.monotonic() - self._began_at, None
                logger.warning("Redis is back after %.1f s", lasted)
