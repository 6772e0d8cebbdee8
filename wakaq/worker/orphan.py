"""Takes the supervisor's place for one worker whose supervisor is gone: what runs is finished, acked and nobody else's.

The orphan registers as a supervisor of its own, moves what it is running into a lane of its own, and hands back what it
has not begun. So others can rescue all the rest at once, and what still runs here is not run twice.
"""

import functools
import logging
import os
import queue as queues
import socket
import time
from collections.abc import Callable
from itertools import count
from typing import Any

from wakaq.broker import OUTAGES, Broker, backoff
from wakaq.frames import ASSIGNED, FINISHED, STARTED, Done, Outcome
from wakaq.turn import Lane, Settlement
from wakaq.worker.executor import Executor, Item

logger = logging.getLogger("wakaq.worker")
BEAT = 3.0  # seconds between heartbeats
PATIENCE = 600.0  # seconds to go on trying to ack while Redis is away


class Orphan:
    """Runs in the control thread, from the supervisor's death to the end of the last task."""

    def __init__(self, executor: Executor, worker_id: str, items: dict[int, Item]) -> None:
        self._executor = executor
        self._items = items
        self._supervisor_id = worker_id
        self._worker_id = f"{worker_id}-orphan-{executor.number}"
        self._broker = Broker(executor.app.settings, executor.app.queues)
        self._reports: queues.SimpleQueue[Any] = queues.SimpleQueue()
        self._lost: set[int] = set()

    def run(self) -> None:
        """Finish what runs; returns when all of it is settled."""
        executor = self._executor
        executor.report = self._reports.put
        executor.stop()
        unstarted = executor.take_back()
        taken = self._taken({item.slot for item in unstarted})
        # One look at each state: what ends from now on is reported here.
        finished = [item for item, state in taken if state == FINISHED]
        running = {item.slot: item for item, state in taken if state in {ASSIGNED, STARTED}}
        logger.warning("The supervisor is gone: ending after %d running tasks", len(running))
        try:
            self._take_over(unstarted, running)
            # Those that the supervisor may not have acked. After the running ones are out of the old lane: an equal
            # payload of theirs must not be acked in their place.
            self._settle([Settlement(self._old_lane(i), "done", [i.payload]) for i in finished])
            while running:
                self._hear(running)
            self._insist(lambda: self._broker.unregister(self._worker_id))
        except OUTAGES:
            logger.exception("Redis is still away: leaving what is in flight to be rescued")

    def _taken(self, unstarted: set[int]) -> list[tuple[Item, int]]:
        """Return what the other threads have taken from the backlog, now or long ago, and its state."""
        states = self._executor.progress.states
        return [
            (item, states[slot])
            for slot, item in self._items.items()
            if slot not in unstarted and item.queue >= 0
        ]

    def _take_over(self, unstarted: list[Item], running: dict[int, Item]) -> None:
        app = self._executor.app
        entry = {
            "beat": 0,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "concurrency": 1,
            "queues": [queue.name for queue in app.queues],
        }
        self._insist(lambda: self._broker.register(self._worker_id, entry))
        back = [
            Settlement(self._old_lane(i), "requeue", [i.payload]) for i in unstarted if i.queue >= 0
        ]
        self._settle(back[::-1])
        for item in running.values():
            adopt = functools.partial(
                self._broker.adopt, self._old_lane(item), self._own_lane(item), item.payload
            )
            self._insist(adopt)

    def _hear(self, running: dict[int, Item]) -> None:
        """Settle the next report; without one, show that this process lives."""
        try:
            report = self._reports.get(timeout=BEAT)
        except queues.Empty:
            self._insist(
                lambda: self._broker.beat(
                    self._worker_id, {"beat": time.monotonic(), "concurrency": 1}
                )
            )
            self._look_for_lost(running)
            return
        match report:
            case Done(slots, _, _):
                done = [running.pop(slot) for slot in slots if slot in running]
                self._settle([Settlement(self._own_lane(i), "done", [i.payload]) for i in done])
            case Outcome(slot, action, new, delay) if slot in running:
                item = running.pop(slot)
                self._settle([Settlement(self._own_lane(item), action, [item.payload], new, delay)])

    def _look_for_lost(self, running: dict[int, Item]) -> None:
        """Settle what was reported to the supervisor just as it died; its report went nowhere.

        Also what it marked as assigned just before it died, and never sent.
        """
        states = self._executor.progress.states
        ended = {slot for slot in running if states[slot] != STARTED}
        for slot in ended & self._lost:
            item = running.pop(slot)
            action = "done" if states[slot] == FINISHED else "requeue"
            self._settle([Settlement(self._own_lane(item), action, [item.payload])])
        self._lost = ended

    def _old_lane(self, item: Item) -> Lane:
        return self._broker.lane(
            self._executor.app.queues[item.queue], self._supervisor_id, item.lane
        )

    def _own_lane(self, item: Item) -> Lane:
        return self._broker.lane(self._executor.app.queues[item.queue], self._worker_id, 1)

    def _settle(self, settlements: list[Settlement]) -> None:
        if settlements:
            self._insist(lambda: self._broker.turn(self._worker_id, None, settlements))

    def _insist(self, call: Callable[[], object]) -> None:
        """Repeat a call until Redis answers; each of ours may be repeated."""
        give_up_at = time.monotonic() + PATIENCE
        for failures in count():
            try:
                call()
            except OUTAGES:
                if time.monotonic() > give_up_at:
                    raise
                time.sleep(backoff(failures))
            else:
                return
