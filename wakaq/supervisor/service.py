"""A named thread around one `tick`: what all of the supervisor's threads but main and dispatcher have in common."""

import logging
import threading
import time

from wakaq.client import LONGEST_BACKOFF, OUTAGES, backoff
from wakaq.supervisor.outage import Outage

logger = logging.getLogger("wakaq.supervisor")


class Service:
    """Calls `tick` until stopped; a tick that fails is logged, and the next one comes.

    Subclasses set `name` and `interval`, and implement `tick`, which does one iteration and neither loops nor sleeps.
    """

    name = "service"
    interval = 1.0
    longest_pause = LONGEST_BACKOFF  # seconds between ticks while Redis is away

    def __init__(self, outage: Outage) -> None:
        self._outage = outage
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"wakaq-{self.name}", daemon=True)

    def tick(self, now: float) -> float | None:
        """Do one iteration at the monotonic time `now`; returns the seconds until the next, None for `interval`."""
        raise NotImplementedError

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ask the thread to end; it does after its tick, which takes no longer than `wait_timeout` while Redis answers."""
        self._stopping.set()

    def join(self, timeout: float) -> bool:
        """Wait for the thread's end; False if it has not come in time."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            now = time.monotonic()
            try:
                wait = self.tick(now)
                failures = 0
            except OUTAGES as error:
                self._outage.begin(error)
                wait = min(backoff(failures), self.longest_pause)
                failures += 1
            # Broad: one bad tick, be it a bug or a key that someone overwrote, must not end the thread that guards a fleet.
            except Exception:
                logger.exception("%s failed, and will try again", self._thread.name)
                wait = max(self.interval, backoff(failures))
                failures += 1
            self._stopping.wait(self.interval if wait is None else wait)
