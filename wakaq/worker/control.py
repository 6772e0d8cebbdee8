"""The control thread of a worker: hears the supervisor, also while a task computes. Not for running anything.

While the main thread has nothing to run it listens itself, so that work which arrives wakes no other thread.
"""

import select
import threading
import time
from collections import deque
from itertools import repeat
from typing import Any

from wakaq.frames import Assign, Channel, Ping, Recall, Recalled
from wakaq.message import name_of
from wakaq.worker.async_runner import AsyncRunner, EventLoop
from wakaq.worker.executor import Executor, Item
from wakaq.worker.orphan import Orphan

_EXCLUSIVE = getattr(select, "EPOLLEXCLUSIVE", 0)


class Control(threading.Thread):
    """The thread; ends some time after the supervisor's Stop, or when the supervisor is gone and all is settled."""

    is_orphan = False  # set before the main thread is told to stop

    def __init__(self, channel: Channel, executor: Executor, loop: EventLoop) -> None:
        super().__init__(name="wakaq-control", daemon=True)
        self._channel = channel
        self._executor = executor
        executor.progress.pong_at = time.monotonic()  # before Ready: from then on silence counts
        self._async_names = {task.name for task in executor.app.tasks.values() if task.is_async}
        self._runner = AsyncRunner(executor, loop.loop) if self._async_names else None
        # In this order: of those that wait, the system wakes the first.
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
            if not self._executor.is_stopping:
                self.is_orphan = True
                Orphan(self._executor).run()

    def wait_for_work(self) -> None:
        """Listen until something has arrived (main thread)."""
        try:
            with self._listening:
                if not self._executor.backlog and not self._executor.is_stopping:
                    self._idle_poll.poll()
                    self._listen()
        except EOFError:
            self.join()  # it sees the end as well

    def _listen(self) -> None:
        executor = self._executor
        for frame in self._channel.receive():
            match frame:
                case Assign(queue, lane, slots, payloads, is_urgent):
                    items = list(zip(slots, repeat(queue), repeat(lane), payloads, strict=False))
                    executor.items.update(zip(slots, items, strict=True))
                    self._give(items, is_urgent=is_urgent)
                case Recall():
                    self._channel.send(Recalled([slot for slot, *_ in executor.take_back()]))
                case Ping():
                    executor.progress.pong_at = time.monotonic()
                    executor.flush()
                    executor.show()
                case _:  # a Stop
                    executor.is_stopping = True

    def _give(self, items: list[Item], *, is_urgent: bool) -> None:
        executor = self._executor
        add = deque.extendleft if is_urgent else deque.extend
        if self._runner:
            kinds: tuple[list[Item], list[Item]] = [], []
            for item in items:
                kinds[name_of(item[-1]) in self._async_names].append(item)
            items, others = kinds
            if others:
                add(executor.async_backlog, others)
                self._runner.wake()
        add(executor.backlog, items)


def _poll(channel: Channel) -> Any:
    """Return what waits for frames; of several that wait, an arrival wakes only one, where the system can do that."""
    poll: Any = select.epoll() if _EXCLUSIVE else select.poll()
    poll.register(channel, select.POLLIN | _EXCLUSIVE)
    return poll
