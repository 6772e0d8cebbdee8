"""The supervisor's record of one worker process: what it has, what it may be given, how to kill it.

Not for the worker's own side, which is `wakaq.worker`, nor for decisions: threads decide, this remembers.
"""

import contextlib
import fcntl
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import NamedTuple

from wakaq.frames import ASSIGNED, SLOTS, STARTED, Channel, Progress
from wakaq.message import describe
from wakaq.turn import Claim

MOST_AHEAD = 256  # sync tasks assigned at once
LONG = 0.05  # seconds; behind a longer task nothing waits but for its last moments: priorities stay strict
HORIZON = 0.005  # seconds of work that is assigned ahead, besides the round trip to Redis
ALIKE = 0.0025  # seconds; tasks in a row that differ by less are expected to go on like that
LAST_BREATH = 1.0  # seconds between the end of a worker's channel and that of its process
STACKS = 64_000  # bytes of a worker's stacks that are read


class Death(NamedTuple):
    """Why we killed a worker: the reason, and the slot and hard deadline of the task it was meant for, if any."""

    reason: str
    slot: int = -1
    deadline: float = 0.0
    stacks: str = ""


class Child:
    """One worker process."""

    def __init__(
        self, number: int, process: BaseProcess, channel: Channel, progress: Progress, stacks: int
    ) -> None:
        # Fixed at spawn.
        self.number = number
        self.process = process
        self.pid: int = process.pid or 0
        self.channel = channel
        self.progress = progress
        self.stacks_fd = stacks
        # So that the worker writes at its end, however often it is emptied.
        fcntl.fcntl(stacks, fcntl.F_SETFL, os.O_APPEND)
        self.spawned_at = time.monotonic()
        # Readable when the process has ended, whether or not the fork server lives to tell.
        has_pidfd = hasattr(os, "pidfd_open")
        self.end_fd: int = os.pidfd_open(self.pid) if has_pidfd else process.sentinel

        # Dispatcher thread only; other threads may look at a slot's claim.
        self.assigned: dict[int, Claim] = {}
        self.async_slots: dict[int, float] = {}  # with the moment of assignment
        self.free = list(range(SLOTS))
        self.left: int | None = None  # how many more tasks it may be assigned; None: any number
        self.is_ready = False
        self.is_first = True  # no other worker of its number still runs sync tasks
        self.is_retiring = False  # to be assigned nothing more
        self.stopped_at: float | None = None  # when it was told to exit; main may look
        self.is_recalling = False  # asked for what it has not started, and yet to answer
        self._window = 1
        self._average: float | None = None
        # Duration of its last task, again if the one before took as long, and when its task is then expected to end.
        self._last, self._steady, self._ends_at = math.inf, 0.0, 0.0

        # Written by the dispatcher before it tells the main thread, which then sees to it.
        self.boot_failure = ""
        self.needs_successor = False  # it was assigned its last task
        self.is_gone = False  # it has ended, and what it had is settled
        self.victims = ""  # what it was running then

        # Main thread only.
        self.has_successor = False

        # Heartbeat thread only.
        self.pinged_at = 0.0

        # Written by the lease thread; the main thread reads it.
        self.rss = 0  # bytes, when it was last looked at

        # Written by the thread that kills, before it does; read by the dispatcher once the worker is gone.
        self.death: Death | None = None

        # Any thread, under _lock: a pid may be signalled only until it is reaped, then it can be someone else's.
        self._lock = threading.Lock()
        self._is_reaped = False

    def __str__(self) -> str:
        return f"Worker {self.number} (pid {self.pid})"

    # -- capacity (dispatcher thread) --------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """How many sync tasks it has, the one that it runs among them."""
        return len(self.assigned) - len(self.async_slots)

    @property
    def is_idle(self) -> bool:
        """Whether a task that arrives now would start now."""
        return self.can_serve and not self.waiting

    @property
    def can_serve(self) -> bool:
        return self.is_ready and self.is_first and not self.is_retiring and self.left != 0

    def observe(self, count: int, busy: float) -> None:
        """Learn from `count` tasks that took `busy` seconds together how many to assign ahead."""
        mean, weight = busy / count, min(0.5, 0.1 * count)
        before = mean if self._average is None else self._average
        self._average = before + weight * (mean - before)
        self._steady = mean if abs(mean - self._last) < ALIKE else 0.0
        self._last = mean

    def _expect(self) -> None:
        """Foresee the end of the task that it has begun, or is about to begin."""
        began_at = self.progress.started_at if self.progress.slot >= 0 else time.monotonic()
        self._ends_at = self._steady and began_at + self._steady

    def sync_room(self, round_trip: float) -> int:
        """Return how many sync tasks to give it now; 0 while it still has two thirds of what it should have."""
        waiting, target, now = self.waiting, 1, time.monotonic()
        if self._average is None or self._average >= LONG:
            target += waiting > 0 and self._ends_soon(now, round_trip)
        elif waiting and self._runs_long(now, round_trip):
            return 0
        else:
            ahead = math.ceil((HORIZON + round_trip) / max(self._average, 1e-6))
            target = min(1 + ahead, self._window, MOST_AHEAD)
            if waiting > target * 2 // 3:
                return 0
        return self._limit(target - waiting)

    def next_at(self, round_trip: float) -> float:
        """Return from when on to claim what follows the running task, if that is expected to end; else a moment gone by."""
        return self._ends_at - HORIZON - round_trip

    def _ends_soon(self, now: float, round_trip: float) -> bool:
        return self.next_at(round_trip) <= now <= self._ends_at + HORIZON

    def async_room(self, limit: int) -> int:
        return self._limit((limit or SLOTS - 2 * MOST_AHEAD) - len(self.async_slots))

    def _limit(self, room: int) -> int:
        return max(0, min(room, len(self.free), SLOTS if self.left is None else self.left))

    def has_too_much(self, now: float, round_trip: float) -> bool:
        """Whether something waits too long behind the running task, or behind all that wait."""
        waiting = self.waiting - 1
        if waiting < 1 or self.is_recalling:
            return False
        # Or more than `sync_room` ever gives, so these became longer than they were.
        is_more = waiting > 1 and waiting * (self._average or 0.0) > 2 * LONG + round_trip
        return is_more or self._runs_long(now, round_trip)

    def _runs_long(self, now: float, round_trip: float) -> bool:
        """Whether it runs a task behind which nothing is to wait."""
        is_long = self.progress.slot >= 0 and now - self.progress.started_at > LONG
        return is_long and not self._ends_soon(now, round_trip)

    def assign(self, claims: list[Claim]) -> list[int]:
        """Note what it is about to be sent; returns the slots."""
        self._window = min(max(self._window, 2 * len(claims)), MOST_AHEAD)
        if not self.waiting:
            self._expect()
        if self.left is not None:
            self.left -= len(claims)
        slots = self.free[-len(claims) :]
        del self.free[-len(claims) :]
        for slot, claim in zip(slots, claims, strict=True):
            self.progress.states[slot] = ASSIGNED
            self.assigned[slot] = claim
        return slots

    def take_back(self, slots: list[int]) -> list[Claim]:
        """Forget assigned slots, and return their claims."""
        self.free += slots
        if self.async_slots:
            for slot in slots:
                self.async_slots.pop(slot, None)
        self._expect()
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

    # -- what it does (any thread) -----------------------------------------------------------------

    def running(self) -> Iterator[tuple[int, float, str]]:
        """Yield slot, start and call of each task that the worker is running."""
        for slot in list(self.assigned):
            claim = self.assigned.get(slot)
            if claim is not None and self.progress.states[slot] == STARTED:
                started_at = self.async_slots.get(slot) or self.progress.started_at
                yield slot, started_at, describe(claim.payload)

    def describe_running(self) -> str:
        return ", ".join(call for _, _, call in self.running())

    def read_stacks(self) -> str:
        """Return what faulthandler wrote last."""
        return os.pread(self.stacks_fd, STACKS, 0).decode(errors="replace")

    # -- signals (any thread) ----------------------------------------------------------------------

    def signal(self, number: int) -> None:
        """Send a signal to the worker, if it still lives."""
        with self._lock:
            if not self._is_reaped:
                self._send(number)

    def ask_for_stacks(self) -> None:
        """Have faulthandler write the stacks of all threads, which it does even while C code holds the GIL."""
        os.ftruncate(self.stacks_fd, 0)
        self.signal(signal.SIGUSR1)

    def kill(self, death: Death) -> None:
        """SIGKILL the worker and its process group, and so what its task has started."""
        with self._lock:
            if not self._is_reaped:
                self.death = self.death or death
                self._kill_group()
                self._send(signal.SIGKILL)  # it may not lead its group yet

    def _send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            # The fork server may have reaped it already: a pid descriptor cannot mean another process, as a pid can.
            if self.end_fd == self.process.sentinel:
                os.kill(self.pid, number)
            else:
                signal.pidfd_send_signal(self.end_fd, number)

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

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
