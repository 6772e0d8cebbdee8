"""Hears the supervisor, also while a task computes. Not for running anything.

While the main thread has nothing to run it listens itself, so that work which arrives has to wake
no other thread.
"""

import select
import threading
import time
from typing import Any

from wakaq.channel import Adopted, Assign, Channel, Ping, Recall, Recalled
from wakaq.worker.assignments import Assignments
from wakaq.worker.async_runner import AsyncRunner, EventLoop
from wakaq.worker.orphan import Orphan

_EXCLUSIVE = getattr(select, "EPOLLEXCLUSIVE", 0)


class Control(threading.Thread):
    """The thread that listens.

    It ends when the supervisor is gone and all is settled. Without it the main thread ends, too:
    nobody is left who could give it work, or tell it to stop.
    """

    is_orphan = False  # set before the main thread is told to stop

    def __init__(
        self, channel: Channel, assignments: Assignments, loop: EventLoop, stacks_fd: int
    ) -> None:
        super().__init__(name="wakaq-control", daemon=True)
        self._channel = channel
        self._assignments = assignments
        self._stacks_fd = stacks_fd
        self._progress = assignments.progress
        self._progress.pong_at = time.monotonic()  # before Ready: from then on silence counts
        self._runner = AsyncRunner(assignments, loop.loop) if assignments.has_async else None
        # In this order: of those that wait, the system wakes the first. With two wake-ups, a single
        # task would cost an idle worker half as much again.
        self._idle_poll, self._poll = _poll(channel), _poll(channel)
        # Whoever holds it hears frames: one thread at a time, and so in their order.
        self._listening = threading.Lock()

    def run(self) -> None:
        try:
            while True:
                self._poll.poll()
                with self._listening:
                    self._listen()
        except EOFError:
            if not self._assignments.is_stopping:  # nobody has told us to stop
                self.is_orphan = True
                Orphan(self._assignments, self._stacks_fd).run()
        finally:
            self._assignments.is_stopping = True

    def listen_when_idle(self) -> None:
        """Listen until something has arrived (main thread)."""
        try:
            with self._listening:
                if not self._assignments.backlog and not self._assignments.is_stopping:
                    self._idle_poll.poll()
                    self._listen()
        except EOFError:
            self.join()  # it sees the end as well
            # Whatever has ended it: a worker without supervisor does not wait for another.
            self._assignments.is_stopping = True

    def _listen(self) -> None:
        assignments = self._assignments
        for frame in self._channel.receive():
            match frame:
                case Assign():
                    if assignments.add(frame) and self._runner:
                        self._runner.wake()
                case Recall():
                    rows = [item.row for item in assignments.take_back()]
                    self._channel.send(Recalled(rows))
                case Adopted():
                    assignments.move(frame)
                case Ping():
                    self._progress.pong_at = time.monotonic()
                    assignments.flush()
                    assignments.show()
                case _:  # a Stop
                    assignments.is_stopping = True


def _poll(channel: Channel) -> Any:
    """Return what waits for frames; of several, an arrival wakes only one, where the system can."""
    poll: Any = select.epoll() if _EXCLUSIVE else select.poll()
    poll.register(channel, select.POLLIN | _EXCLUSIVE)
    return poll
