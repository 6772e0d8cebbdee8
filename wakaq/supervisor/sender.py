"""Sends a slot group's turns, each until it is answered: the dispatcher never waits for Redis.

A request waits here until it is due, or a waker has seen work arrive; until then the dispatcher may
replace it by one that carries more. The states of a request, under a lock:

========  ==========================================  ==============================================
state     meaning                                     moved on by
========  ==========================================  ==============================================
NONE      nothing to send                             dispatcher: `offer`
WAITING   to be sent at a moment, or at a wake-up     this thread, or a waker: `wake`
SENT      perhaps executed: not to be changed         who sent it, when it is answered
ANSWERED  posted to the dispatcher                    dispatcher: `take_note`
========  ==========================================  ==============================================

Not for what a request says: that is `wakaq.store.turns`.
"""

import contextlib
import enum
import logging
import queue as queues
import threading
import time
from collections.abc import Callable

from wakaq.service import REGISTRY_UNUSABLE, Outage, crash, give_up
from wakaq.store.broker import Broker
from wakaq.store.turns import Answer, Refused, Request, Turn, exchange

logger = logging.getLogger("wakaq.supervisor")


class _State(enum.Enum):
    NONE = enum.auto()
    WAITING = enum.auto()
    SENT = enum.auto()
    ANSWERED = enum.auto()


class Sender(threading.Thread):
    """The thread.

    `answered` is called in it with each request, its answer, and the seconds that took.
    """

    def __init__(
        self,
        broker: Broker,
        answered: Callable[[Request, Answer, float], None],
        outage: Outage,
        longest_pause: float,
    ) -> None:
        super().__init__(name="wakaq-turns", daemon=True)
        self._longest_pause = longest_pause  # between attempts: no longer than between heartbeats
        self._broker = broker
        self._answered = answered
        self._outage = outage
        self._stopping = threading.Event()

        # Any thread, under _lock; what changes is told by something in _news.
        self._lock = threading.Lock()
        self._news: queues.SimpleQueue[None] = queues.SimpleQueue()
        self._state = _State.NONE
        self._request: Request | None = None
        self._send_at = 0.0
        self._is_woken = False  # something has arrived since the last request was sent

    # -- the dispatcher ----------------------------------------------------------------------------

    def offer(self, request: Request, send_at: float) -> bool:
        """Have a request sent at a moment, in the place of one that waits.

        False if that was sent.
        """
        with self._lock:
            if self._state in {_State.SENT, _State.ANSWERED}:
                return False
            self._state, self._request, self._send_at = _State.WAITING, request, send_at
        self._news.put(None)
        return True

    @property
    def is_open(self) -> bool:
        """Whether a request may be offered; it may just have been sent, all the same."""
        return self._state in {_State.NONE, _State.WAITING}

    def take_note(self) -> None:
        """Take note of the answer: the next request may be offered."""
        with self._lock:
            self._state, self._request = _State.NONE, None

    def stop(self) -> None:
        """End the thread, also where no answer comes."""
        self._stopping.set()
        self._news.put(None)

    # -- wakers ------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Send the turn that waits, in the caller's thread: on an idle machine each hop counts.

        If there is none, the next one is sent as soon as it is offered.
        """
        with self._lock:
            self._is_woken = True
            request, _ = self._take_due()
        if request is not None:
            self._send(request)

    # -- the thread --------------------------------------------------------------------------------

    def run(self) -> None:
        while (request := self._next()) is not None:
            self._send(request)

    def _next(self) -> Request | None:
        """Wait for a request that is due; None at the end."""
        while not self._stopping.is_set():
            with self._lock:
                request, wait = self._take_due()
            if request is not None:
                return request
            with contextlib.suppress(queues.Empty):
                self._news.get(timeout=wait)
        return None

    def _take_due(self) -> tuple[Request | None, float | None]:
        """Return the request that is to be sent now, else how long there is none (under _lock)."""
        if self._state is not _State.WAITING:
            return None, None
        wait = self._send_at - time.monotonic()
        if wait > 0 and not (self._is_woken and isinstance(self._request, Turn)):
            return None, wait
        self._state, self._is_woken = _State.SENT, False
        return self._request, None

    def _send(self, request: Request) -> None:
        """Send a request until it is answered (whichever thread has taken it)."""
        begin = time.monotonic()
        try:
            answer = exchange(request, self._broker, self._pause, self._outage.begin)
            if self._stopping.is_set():
                return
            now = time.monotonic()
            self._outage.end(begin)
            with self._lock:
                self._state = _State.ANSWERED
            self._answered(request, answer, now - begin)
        except Refused as refusal:
            give_up(str(refusal), REGISTRY_UNUSABLE)
        except BaseException:  # noqa: BLE001 - whatever it is
            crash("The sender of turns")

    def _pause(self, seconds: float) -> bool:
        return self._stopping.wait(min(seconds, self._longest_pause))
