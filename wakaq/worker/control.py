"""The control thread of a worker: hears the supervisor, also while a task computes. Not for running anything.

While the main thread has nothing to run it listens itself, so that work which arrives wakes no other thread first.
"""

import select
import threading
import time

from wakaq.frames import Assign, Channel, Ping, Recall, Recalled, Stop
from wakaq.worker.async_runner import AsyncRunner
from wakaq.worker.executor import Executor, Item
from wakaq.worker.orphan import Orphan


class Control(threading.Thread):
    """The thread; ends some time after the supervisor's Stop, or when the supervisor is gone and all is settled."""

    def __init__(self, channel: Channel, executor: Executor, worker_id: str) -> None:
        super().__init__(name="wakaq-control", daemon=True)
        # Fixed.
        self._channel = channel
        self._executor = executor
        self._worker_id = worker_id

        # Whoever holds the lock: one thread at a time hears frames, and so in their order.
        self._listening = threading.Lock()
        self._runner = AsyncRunner(executor)

        # Written here before the main thread is told to stop.
        self.is_orphan = False

    def run(self) -> None:
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        try:
            while True:
                poll.poll()
                with self._listening:
                    self._listen(wait=False)
        except EOFError:
            if not self._executor.is_stopping:
                self.is_orphan = True
                Orphan(self._executor, self._worker_id).run()

    def wait_for_work(self) -> None:
        """Listen until something has arrived (main thread)."""
        try:
            with self._listening:
                if self._executor.is_idle:
                    self._listen(wait=True)
        except EOFError:  # the control thread sees it as well, and has this one stop
            self._executor.stopping.wait()

    def _listen(self, *, wait: bool) -> None:
        for frame in self._channel.receive(wait=wait):
            self._hear(frame)

    def _hear(self, frame: object) -> None:
        executor = self._executor
        match frame:
            case Assign(queue, lane, slots, payloads, is_urgent):
                items = [
                    Item(slot, queue, lane, p) for slot, p in zip(slots, payloads, strict=True)
                ]
                executor.items.update(zip(slots, items, strict=True))
                items = self._runner.take(items)
                if items:
                    executor.give(items, is_urgent=is_urgent)
            case Recall():
                slots = [item.slot for item in executor.take_back()]
                for slot in slots:
                    del executor.items[slot]
                self._channel.send(Recalled(slots))
            case Ping():
                executor.progress.pong_at = time.monotonic()
                executor.flush()
                executor.show()
            case Stop():
                executor.stop()
            case _:
                raise AssertionError(frame)
