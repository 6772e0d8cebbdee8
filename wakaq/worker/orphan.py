"""Takes the supervisor's place for one worker whose supervisor is gone: what runs is finished, acked and nobody else's.

The orphan registers as a supervisor of its own, moves what it is running into a lane of its own, and hands back what it
has not begun. So others can rescue all the rest at once, and what still runs here is not run twice. What it had reported
is not touched: whether the supervisor has acked it nobody knows, and an equal payload in its lane may be another's.
"""

import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from queue import Empty, SimpleQueue
from typing import Any

from wakaq.client import OUTAGES, backoff
from wakaq.frames import Done
from wakaq.letters import HARD_TIMEOUT, Letter
from wakaq.message import describe
from wakaq.turn import Lane, Settlement
from wakaq.worker.executor import Executor

logger = logging.getLogger("wakaq.worker")
BEAT = 3.0  # seconds between heartbeats
GLANCE = 0.1  # seconds between looks at the limits of what is running
PATIENCE = 600.0  # seconds to go on trying to ack while Redis is away


class Orphan:
    """Runs in the control thread, from the supervisor's death to the end of the last task."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._broker = executor.app.broker
        # Not its number, which a worker shares with its replacement.
        self._worker_id = f"{executor.worker_id}-orphan-{os.getpid()}"
        self._entry: dict[str, Any] = {
            "beat": 0.0,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "concurrency": 1,
            "queues": [queue.name for queue in executor.app.queues],
        }
        self._reports: SimpleQueue[Any] = SimpleQueue()
        self._claims: dict[int, tuple[Lane, bytes]] = {}  # by slot: what is to be settled

    def run(self) -> None:
        """Finish what runs; returns when all of it is settled."""
        executor, queues = self._executor, self._executor.app.queues
        executor.report = self._reports.put
        executor.is_stopping = True
        unstarted = executor.take_back()
        # What is in `items` now will be reported to us.
        running = list(executor.items.copy().values())
        for slot, queue, number, payload in unstarted + running:
            if queue >= 0:  # Broadcasts are in no lane, and run by others as well.
                lane = self._broker.lane(queues[queue], executor.worker_id, number)
                self._claims[slot] = lane, payload
        logger.warning("The supervisor is gone: ending after %d running tasks", len(running))
        try:
            if running:
                self._insist(self._broker.register, self._worker_id, self._entry)
            for slot in [slot for slot, *_ in running if slot in self._claims]:
                lane, payload = self._claims[slot]
                own = self._broker.lane(lane.queue, self._worker_id, 1)
                self._insist(self._broker.adopt, lane, own, payload)
                self._claims[slot] = own, payload
            self._settle("requeue", [slot for slot, *_ in reversed(unstarted)])
            while self._claims:
                self._hear()
                self._keep_time(time.monotonic())
            self._insist(self._broker.unregister, self._worker_id)
        except OUTAGES:
            logger.exception("Redis is still away: leaving what is in flight to be rescued")

    def _hear(self) -> None:
        with suppress(Empty):
            report = self._reports.get(timeout=GLANCE)
            if isinstance(report, Done):
                self._settle("done", report.slots)
            else:
                self._settle(report.action, [report.slot], report.new, report.delay)

    def _keep_time(self, now: float) -> None:
        """Show that this process lives, and do what the supervisor's timeouts did."""
        if now >= self._entry["beat"] + BEAT:
            self._entry["beat"] = now
            with suppress(*OUTAGES):  # not to keep the limits waiting
                self._broker.beat(self._worker_id, self._entry)
        progress = self._executor.progress
        if 0.0 < progress.soft_deadline <= now:
            os.kill(os.getpid(), signal.SIGUSR2)
        for slot in list(self._claims):
            if 0.0 < progress.hard_deadlines[slot] <= now:
                self._die(slot)

    def _die(self, slot: int) -> None:
        """Kill this process and what its task started; what else it was running is run again."""
        payload = self._claims[slot][1]
        logger.error("%s ran into its hard timeout", describe(payload))
        letter = Letter(payload, HARD_TIMEOUT, "", self._executor.name)
        self._settle("dead", [slot], letter.encode())
        self._settle("requeue", list(self._claims))
        self._insist(self._broker.unregister, self._worker_id)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    def _settle(self, action: str, slots: list[int], new: bytes = b"", delay: float = 0.0) -> None:
        claims = [self._claims.pop(slot) for slot in slots if slot in self._claims]
        settlements = [Settlement(lane, action, [payload], new, delay) for lane, payload in claims]
        if settlements:
            self._insist(self._broker.turn, self._worker_id, None, settlements)

    def _insist(self, call: Callable[..., object], *args: Any) -> None:
        """Repeat a call until Redis answers; each of ours may be repeated."""
        give_up_at = time.monotonic() + PATIENCE
        for failures in count():
            try:
                call(*args)
                break
            except OUTAGES:
                if time.monotonic() > give_up_at:
                    raise
                time.sleep(backoff(failures))
