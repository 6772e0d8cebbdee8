"""What the supervisor's threads post to each other. Not for what goes over a worker's channel: that is `wakaq.frames`."""

import contextlib
import os
import queue as queues
from collections.abc import Iterator
from typing import Any, NamedTuple

from wakaq.supervisor.child import Child


class Inbox:
    """A queue with a descriptor to wait on: any thread posts, and a signal handler, too; one thread takes."""

    def __init__(self) -> None:
        self._events: queues.SimpleQueue[Any] = queues.SimpleQueue()
        self._reader, self._writer = os.pipe()
        for fd in (self._reader, self._writer):
            os.set_blocking(fd, False)

    def fileno(self) -> int:
        return self._reader

    def is_empty(self) -> bool:
        return self._events.empty()

    def post(self, event: Any) -> None:
        self._events.put(event)
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes as well
            os.write(self._writer, b"!")

    def take(self) -> Iterator[Any]:
        """Return what was posted until now."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._reader, 4096)  # before the queue: what is posted later, wakes again
        while not self._events.empty():
            yield self._events.get()


# What others post.
class Joined(NamedTuple):
    """A worker was spawned."""

    child: Child


class Relay(NamedTuple):
    """A broadcast is to run in one of the workers."""

    payload: bytes


class Blocked(NamedTuple):
    """A part of a frame waits until the child's socket takes it."""

    child: Child


class Ended(NamedTuple):
    """A worker has exited."""

    child: Child


class Retire(NamedTuple):
    """A worker is to exit after what it runs now."""

    child: Child


class Drain(NamedTuple):
    """Claim nothing any more, let run what runs, and have every worker exit."""


class Finish(NamedTuple):
    """All workers are gone and all watchers have ended: settle the rest, by the deadline, and end."""

    deadline: float


# What the dispatcher posts to the main thread.
class Booted(NamedTuple):
    """A worker is ready."""

    child: Child


class BootFailed(NamedTuple):
    """A worker says why it cannot start."""

    child: Child
    reason: str


class Retiring(NamedTuple):
    """It was assigned its last task."""

    child: Child


class Gone(NamedTuple):
    """A worker has ended, and what it had is settled; `victims` are the tasks that it was running."""

    child: Child
    victims: list[str]


class Crashed(NamedTuple):
    """The dispatcher itself failed."""

    error: BaseException
