"""What the supervisor's threads post to each other. Not for what goes over a worker's channel: that is `wakaq.frames`."""

from typing import NamedTuple

from wakaq.supervisor.child import Child


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
