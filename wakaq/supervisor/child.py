"""The supervisor's record of one worker process: what it has, and how to kill it.

Not for the worker's own side, which is `wakaq.worker`, nor for decisions: threads decide, this
remembers. How much a worker is to be given is in `prefetch`.

A child's life, and who moves it on:

========  ==============================================  ======================================
state     meaning                                         moved on by
========  ==============================================  ======================================
STARTING  forked; runs the hooks of its start             dispatcher, at its Ready
SERVING   takes work                                      dispatcher: last task, memory, shutdown
RETIRING  ends what it has, takes no more                 dispatcher, when it has nothing left
STOPPING  told to exit                                    dispatcher, when its channel or process
                                                          has ended
GONE      what it had is settled; to be replaced          main, which reaps it
========  ==============================================  ======================================

Every state can be followed by GONE: a worker may die at any time.
"""

import contextlib
import enum
import errno
import fcntl
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from wakaq.message import describe
from wakaq.progress import ASSIGNED, ROWS, STARTED
from wakaq.store.turns import Claim
from wakaq.supervisor.fork_server import Endpoints

STACKS = 64_000  # bytes of a worker's stacks that are read


class State(enum.Enum):
    """Where a child is in its life."""

    STARTING = enum.auto()
    SERVING = enum.auto()
    RETIRING = enum.auto()
    STOPPING = enum.auto()
    GONE = enum.auto()


class Death(NamedTuple):
    """Why we killed a worker.

    The reason, and row and hard deadline of the task it was meant for, if any.
    """

    reason: str
    row: int = -1
    deadline: float = 0.0
    stacks: str = ""


class Child:
    """One worker process."""

    def __init__(self, slot: int, pid: int, endpoints: Endpoints) -> None:
        # Fixed at spawn.
        self.slot = slot
        self.pid = pid
        self.channel = endpoints.channel
        self.progress = endpoints.progress
        self.stacks_fd = endpoints.stacks
        # So that the worker writes at its end, however often it is emptied.
        fcntl.fcntl(self.stacks_fd, fcntl.F_SETFL, os.O_APPEND)
        self.spawned_at = time.monotonic()
        # Readable when the process has ended, whether or not the fork server lives to tell; it
        # cannot mean another process, as a pid can. None where the system has none: then the end of
        # the channel tells.
        self.end_fd = _end_of(pid)

        # Dispatcher thread only; other threads may read state, has_served and what it has.
        self.state = State.STARTING
        self.has_served = False  # it has booted
        self.assigned: dict[int, Claim] = {}  # by row
        # Of these, the async ones, with the moment of assignment.
        self.async_rows: dict[int, float] = {}
        self.free_rows = list(range(ROWS))
        self.left: int | None = None  # how many more tasks it may be assigned; None: any number
        self.is_recalling = False  # asked for what it has not started, and yet to answer
        self.is_reserved = False  # takes nothing, so that it will be empty for a suspect
        self.runs_suspect = False  # takes nothing until that one is settled
        # What it takes to know how much to assign ahead; see `prefetch`.
        self.window = 1  # sync tasks at most
        self.average: float | None = None  # seconds that a sync task takes; None: not known yet

        # Written by the dispatcher before it tells the main thread.
        self.boot_failure = ""
        self.was_running = ""  # when it died, for people
        self.stopped_at: float | None = None  # when it was told to exit

        # Heartbeat thread only.
        self.pinged_at = 0.0

        # Written by the lease thread; the main thread reads it.
        self.rss = 0  # bytes, when it was last looked at

        # Written by the thread that kills, before it does; read by the dispatcher once the worker
        # is gone.
        self.death: Death | None = None

        # Any thread, under _lock: a pid may be signalled only until it is reaped, then it can be
        # someone else's; and the stacks may be read only until they are closed.
        self._lock = threading.Lock()
        self._is_reaped = False

    def __str__(self) -> str:
        return f"Worker {self.slot} (pid {self.pid})"

    @property
    def sync_count(self) -> int:
        """How many sync tasks it has, the one that it runs among them."""
        return len(self.assigned) - len(self.async_rows)

    # -- what it has (dispatcher thread) -----------------------------------------------------------

    def assign(self, claims: list[Claim], *, is_async: bool) -> list[int]:
        """Note what it is about to be sent; returns the rows."""
        if self.left is not None:
            self.left -= len(claims)
        rows = self.free_rows[-len(claims) :]
        del self.free_rows[-len(claims) :]
        for row, claim in zip(rows, claims, strict=True):
            self.progress.states[row] = ASSIGNED
            self.assigned[row] = claim
        if is_async:
            self.async_rows.update(dict.fromkeys(rows, time.monotonic()))
        return rows

    def serve(self) -> None:
        """Note that it has booted."""
        self.has_served = True
        if self.state is State.STARTING:
            self.state = State.SERVING

    def take_back(self, rows: list[int]) -> list[Claim]:
        """Forget rows that it has not started, and return their claims."""
        if self.left is not None:
            self.left += len(rows)
        return self.release(rows)

    def release(self, rows: list[int]) -> list[Claim]:
        """Forget rows that it reported, and return their claims."""
        self.free_rows += rows
        if self.async_rows:
            for row in rows:
                self.async_rows.pop(row, None)
        return [self.assigned.pop(row) for row in rows]

    # -- what it does (any thread) -----------------------------------------------------------------

    def running(self) -> Iterator[tuple[int, float, str]]:
        """Yield row, start and call of each task that the worker is running."""
        for row in list(self.assigned):
            claim = self.assigned.get(row)
            if claim is not None and self.progress.states[row] == STARTED:
                started_at = self.async_rows.get(row) or self.progress.started_at
                yield row, started_at, describe(claim.payload)

    def describe_running(self) -> str:
        """Return the calls that it is running."""
        return ", ".join(call for _, _, call in self.running())

    # -- signals (any thread) ----------------------------------------------------------------------

    def signal(self, number: int) -> None:
        """Send a signal to the worker, if it still lives."""
        with self._lock:
            if not self._is_reaped:
                self._send(number)

    def ask_for_stacks(self) -> None:
        """Have faulthandler write the stacks of all threads, also while C code holds the GIL."""
        with self._lock:
            if not self._is_reaped:
                os.ftruncate(self.stacks_fd, 0)
                self._send(signal.SIGUSR1)

    def read_stacks(self) -> str:
        """Return what faulthandler wrote last."""
        with self._lock:
            if self._is_reaped:
                return ""
            text = os.pread(self.stacks_fd, STACKS, 0).decode(errors="replace")
        return "\n\n".join(map(_without_our_start, text.split("\n\n")))

    def kill(self, death: Death) -> None:
        """SIGKILL the worker and its process group, and so what its task has started."""
        with self._lock:
            if not self._is_reaped:
                self.death = self.death or death
                self._kill_group()
                self._send(signal.SIGKILL)  # it may not lead its group yet

    def _send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self.end_fd is None:
                os.kill(self.pid, number)
            else:
                signal.pidfd_send_signal(self.end_fd, number)

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def reap(self) -> None:
        """Give up what was held for a worker that has ended, or is to (main thread).

        Unless it was told to exit, what is left of its process group is killed: no subprocess
        outlives its task's crash.
        """
        with self._lock:
            if self.stopped_at is None:
                self._kill_group()
            self._send(signal.SIGKILL)
            self._is_reaped = True
            os.close(self.stacks_fd)
            if self.end_fd is not None:
                os.close(self.end_fd)
        self.channel.close()


def _end_of(pid: int) -> int | None:
    """Return a descriptor that becomes readable when the process has ended.

    None where the system has no such thing, or forbids it, or the process has ended already: then
    its channel and the fork server tell.
    """
    if hasattr(os, "pidfd_open"):
        try:
            return os.pidfd_open(pid)
        except OSError as error:
            if error.errno not in {errno.ENOSYS, errno.EPERM, errno.ESRCH}:
                raise
    return None


def _without_our_start(stack: str) -> str:
    """Return a thread's stack, most recent call first, without what led to the worker's start."""
    lines = stack.split("\n")
    starts = [index for index, line in enumerate(lines) if "wakaq/worker/main.py" in line]
    return "\n".join(lines[: starts[0] + 1] if starts else lines)
