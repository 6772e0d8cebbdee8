"""Takes the supervisor's place for one worker whose supervisor is gone: what runs is finished, acked and nobody else's.

The orphan registers as a supervisor of its own, moves what it is running into a lane of its own, and hands back what it
has not begun. So others can rescue all the rest at once, and what still runs here is not run twice. What it had reported
is not touched: whether the supervisor has acked it nobody knows, and an equal payload in its lane may be another's.
"""

import functools
import logging
import os
import queue as queues
import signal
import socket
import time
from collections.abc import Callable
from itertools import count
from typing import Any

from wakaq.broker import Broker
from wakaq.client import OUTAGES, backoff
from wakaq.frames import Done, Outcome
from wakaq.letters import HARD_TIMEOUT, Letter
from wakaq.message import describe
from wakaq.turn import Lane, Settlement
from wakaq.worker.executor import Executor, Item

logger = logging.getLogger("wakaq.worker")
BEAT = 3.0  # seconds between heartbeats
GLANCE = 0.1  # seconds between looks at the limits of what is running
PATIENCE = 600.0  # seconds to go on trying to ack while Redis is away


class Orphan:
    """Runs in the control thread, from the supervisor's death to the end of the last task."""

    def __init__(self, executor: Executor, worker_id: str) -> None:
        self._executor = executor
        self._supervisor_id = worker_id
        # Not its number, which a worker shares with its replacement.
        self._worker_id = f"{worker_id}-orphan-{os.getpid()}"
        self._broker = Broker(executor.app.settings, executor.app.queues)
        self._reports: queues.SimpleQueue[Any] = queues.SimpleQueue()
        self._running: dict[int, Item] = {}  # by slot
        self._beat_at = 0.0

    def run(self) -> None:
        """Finish what runs; returns when all of it is settled."""
        executor = self._executor
        executor.report = self._reports.put
        executor.stop()
        unstarted = [item for item in executor.take_back() if item.queue >= 0]
        # What is in here now will be reported to us.
        taken = executor.items.copy()
        for item in unstarted:
            taken.pop(item.slot, None)
        self._running = {slot: item for slot, item in taken.items() if item.queue >= 0}
        logger.warning("The supervisor is gone: ending after %d running tasks", len(self._running))
        try:
            self._take_over(unstarted)
            while self._running:
                self._hear()
                self._keep_time(time.monotonic())
            self._insist(lambda: self._broker.unregister(self._worker_id))
        except OUTAGES:
            logger.exception("Redis is still away: leaving what is in flight to be rescued")

    def _entry(self) -> dict[str, Any]:
        return {
            "beat": time.monotonic(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "concurrency": 1,
            "queues": [queue.name for queue in self._executor.app.queues],
        }

    def _take_over(self, unstarted: list[Item]) -> None:
        if self._running:
            self._insist(lambda: self._broker.register(self._worker_id, self._entry()))
        for item in list(self._running.values()):
            adopt = functools.partial(
                self._broker.adopt, self._old_lane(item), self._own_lane(item), item.payload
            )
            self._insist(adopt)
        back = [Settlement(self._old_lane(item), "requeue", [item.payload]) for item in unstarted]
        self._settle(back[::-1])

    def _hear(self) -> None:
        """Settle the next report."""
        try:
            report = self._reports.get(timeout=GLANCE)
        except queues.Empty:
            return
        match report:
            case Done(slots, _, _):
                items = [self._running.pop(slot) for slot in slots if slot in self._running]
                self._settle([Settlement(self._own_lane(i), "done", [i.payload]) for i in items])
            case Outcome(slot, action, new, delay) if slot in self._running:
                item = self._running.pop(slot)
                self._settle([Settlement(self._own_lane(item), action, [item.payload], new, delay)])

    def _keep_time(self, now: float) -> None:
        """Show that this process lives, and do what the supervisor's timeouts did."""
        if now >= self._beat_at:
            self._beat_at = now + BEAT
            self._insist(lambda: self._broker.beat(self._worker_id, self._entry()))
        progress = self._executor.progress
        if 0.0 < progress.soft_deadline <= now:
            os.kill(os.getpid(), signal.SIGUSR2)
        for slot in list(self._running):
            if 0.0 < progress.hard_deadlines[slot] <= now:
                self._die(self._running.pop(slot))

    def _die(self, item: Item) -> None:
        """Kill this process and what its task started; what else it was running is run again."""
        logger.error("%s ran into its hard timeout", describe(item.payload))
        letter = Letter(item.payload, HARD_TIMEOUT, "", self._executor.name).encode()
        settlements = [Settlement(self._own_lane(item), "dead", [item.payload], letter)]
        settlements += [
            Settlement(self._own_lane(i), "requeue", [i.payload]) for i in self._running.values()
        ]
        self._settle(settlements)
        self._insist(lambda: self._broker.unregister(self._worker_id))
        os.killpg(os.getpgrp(), signal.SIGKILL)

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
