"""The supervisor's record of one worker process: what it has, what it may be given, how to kill it.

Not for the worker's own side, which is `wakaq.worker`, nor for decisions: threads decide, this remembers.
"""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import NamedTuple

from wakaq.frames import ASSIGNED, SLOTS, Channel, Progress
from wakaq.turn import Claim

MOST_AHEAD = 256  # sync tasks assigned at once
LONG = (
    0.05  # seconds; behind a task that takes longer nothing waits, so that priorities stay strict
)
LAST_BREATH = 1.0  # seconds between the end of a worker's channel and that of its process
HORIZON = (
    0.005  # seconds of work that short tasks are assigned ahead, besides the round trip to Redis
)


class Death(NamedTuple):
    """Why we killed a worker: the reason, and the slot and hard deadline of the task it was meant for, if any."""

    reason: str
    slot: int = -1
    deadline: float = 0.0
    stacks: str = ""


class Child:
    """One worker process."""

    def __init__(
        self,
        number: int,
        process: BaseProcess,
        channel: Channel,
        progress: Progress,
        stacks_fd: int,
    ) -> None:
        # Fixed at spawn.
        self.number = number
        self.process = process
        self.pid: int = process.pid or 0
        self.channel = channel
        self.progress = progress
        self.stacks_fd = stacks_fd
        self.spawned_at = time.monotonic()
        # Readable when the process has ended, whether or not the fork server lives to tell.
        self.end_fd: int = (
            os.pidfd_open(self.pid) if hasattr(os, "pidfd_open") else process.sentinel
        )

        # Dispatcher thread only; other threads may look at a slot's claim.
        self.assigned: dict[int, Claim] = {}
        self.async_slots: dict[
            int, float
        ] = {}  # with the moment of assignment, and so of the start
        self.free = list(range(SLOTS))
        self.left: int | None = None  # how many more tasks it may be assigned; None: any number
        self.is_ready = False
        self.is_retiring = False  # to be assigned nothing more
        self.stopped_at: float | None = None  # when it was told to exit; main may look
        self.is_recalling = False  # asked for what it has not started, and yet to answer
        self._window = 1
        self._average: float | None = None

        # Main thread only.
        self.has_replacement = False

        # Written by the lease thread; the main thread reads it.
        self.rss = 0  # bytes, when it was last looked at

        # Written by the thread that kills, before it does; read by the dispatcher once the worker is gone.
        self.death: Death | None = None

        # Any thread, under _lock: a pid may be signalled only until it is reaped, then it can be someone else's.
        self._lock = threading.Lock()
        self._is_reaped = False

    # -- capacity (dispatcher thread) --------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """How many sync tasks it has, the one that it runs among them."""
        return len(self.assigned) - len(self.async_slots)

    @property
    def is_idle(self) -> bool:
        """Whether a task that arrives now would start now."""
        return self.can_serve and len(self.assigned) == len(self.async_slots)

    @property
    def can_serve(self) -> bool:
        return self.is_ready and not self.is_retiring and self.left != 0

    def observe(self, count: int, busy: float) -> None:
        """Learn from `count` tasks that took `busy` seconds together how many to assign ahead."""
        mean, weight = busy / count, min(0.5, 0.1 * count)
        self._average = (
            mean if self._average is None else self._average + weight * (mean - self._average)
        )

    def sync_room(self, round_trip: float) -> int:
        """Return how many sync tasks to give it now; 0 while it still has half of what it should have."""
        waiting = self.waiting
        target = 1
        if self._average is not None and self._average < LONG:
            ahead = math.ceil((HORIZON + round_trip) / max(self._average, 1e-6))
            target = min(1 + ahead, self._window, MOST_AHEAD)
            if waiting > target // 2:
                return 0
        return self._limit(target - waiting)

    def has_too_much(self, now: float, round_trip: float) -> bool:
        """Whether something waits too long behind the running task, or behind all that wait."""
        if self.waiting < 2 or self.is_recalling:  # noqa: PLR2004 - the running one, and one that waits
            return False
        if self.progress.slot >= 0 and now - self.progress.started_at > LONG:
            return True
        # More than `sync_room` ever gives, so these became longer than they were.
        return (self.waiting - 1) * (self._average or 0.0) > 2 * LONG + round_trip

    def async_room(self, limit: int) -> int:
        return self._limit((limit or SLOTS - 2 * MOST_AHEAD) - len(self.async_slots))

    def _limit(self, room: int) -> int:
        if self.left is not None:
            room = min(room, self.left)
        return max(0, min(room, len(self.free)))

    def assign(self, claims: list[Claim]) -> list[int]:
        """Note what it is about to be sent; returns the slots."""
        self._window = min(max(self._window, 2 * len(claims)), MOST_AHEAD)
        if self.left is not None:
            self.left -= len(claims)
        states, assigned = self.progress.states, self.assigned
        slots = self.free[-len(claims) :]
        del self.free[-len(claims) :]
        for slot, claim in zip(slots, claims, strict=True):
            states[slot] = ASSIGNED
            assigned[slot] = claim
        return slots

    def take_back(self, slots: list[int]) -> list[Claim]:
        """Forget assigned slots, and return their claims."""
        self.free += slots
        if self.async_slots:
            for slot in slots:
                self.async_slots.pop(slot, None)
        return [self.assigned.pop(slot) for slot in slots]

    def recalled(self, slots: list[int]) -> list[Claim]:
        """Forget what it gave back, and return the claims."""
        self.is_recalling = False
        if self.left is not None:
            self.left += len(slots)
        return self.take_back(slots)

    def has_begun_its_last(self) -> bool:
        """Whether it was assigned its last task, so that nothing can come back for it to run instead."""
        is_last = self.left == 0 and self.waiting <= 1
        return is_last and not self.is_recalling and not self.is_retiring

    def started_at(self, slot: int) -> float:
        """Return when the worker started a task; any thread may ask."""
        return self.async_slots.get(slot) or self.progress.started_at

    # -- signals (any thread) ----------------------------------------------------------------------

    def signal(self, number: int) -> None:
        """Send a signal to the worker, if it still lives."""
        with self._lock:
            if not self._is_reaped:
                self._send(number)

    def kill(self, death: Death) -> None:
        """SIGKILL the worker and its process group, and so what its task has started."""
        with self._lock:
            if not self._is_reaped:
                self.death = self.death or death
                self._kill_group()
                self._send(signal.SIGKILL)  # it may not lead its group yet

    def _send(self, number: int) -> None:
        # The fork server may have reaped it already: a pid descriptor cannot mean another process, as a pid can.
        if self.end_fd == self.process.sentinel:
            _ignore_gone(os.kill, self.pid, number)
        else:
            _ignore_gone(signal.pidfd_send_signal, self.end_fd, number)

    def _kill_group(self) -> None:
        _ignore_gone(os.killpg, self.pid, signal.SIGKILL)

    def reap(self) -> int | None:
        """Wait for the end of a worker whose channel has ended, and return its exit status (main thread).

        Unless it was told to exit, what is left of its process group is killed: no subprocess outlives its task's crash.
        """
        if self.stopped_at is None:
            self._kill_group()
        self.process.join(LAST_BREATH)
        with self._lock:
            if self.process.exitcode is None:
                self._send(signal.SIGKILL)
            self._is_reaped = True
        self.process.join(LAST_BREATH)
        self.channel.close()
        os.close(self.stacks_fd)
        if self.end_fd != self.process.sentinel:
            os.close(self.end_fd)
        return self.process.exitcode


def _ignore_gone(send: Callable[[int, int], None], pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        send(pid, number)
