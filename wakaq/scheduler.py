"""Enqueues periodic tasks when they are due. Not for saying when that is: `cron` does; nor a thread or a process: see `cli`.

Any number may run at once: `Broker.fire` enqueues a tick of a schedule once, whoever comes first.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from wakaq.app import WakaQ
from wakaq.broker import Broker
from wakaq.client import OUTAGES, RedisError
from wakaq.cron import CronTask
from wakaq.queue import Queue

logger = logging.getLogger("wakaq.scheduler")

GRACE = 600.0  # seconds for which a missed tick is enqueued late
STALL = 10.0  # seconds after which what is due counts as missed, and of several missed ticks one is enough
LOOK = 30.0  # seconds between looks at the clock, which may be set or be another server's
REMEMBER = 86_400  # seconds for which no stopped and continued scheduler repeats a tick


@dataclass(slots=True, eq=False)
class _Entry:
    """A schedule, and its first tick that has not been enqueued; unix time."""

    schedule: CronTask
    identity: str
    queue: Queue
    due_at: float = 0.0


class Scheduler:
    """All schedules of an application, by the clock of its Redis; one thread calls `tick`.

    Args:
        app: The application.
        broker: The way to Redis.
        show: Gets a text for the process title that says what comes next.
    """

    def __init__(self, app: WakaQ, broker: Broker, show: Callable[[str], None]) -> None:
        self._broker = broker
        self._show = show
        self._said = ""
        self._entries = [
            _Entry(one, one.identity, app.resolve_queue(one.queue, app.tasks[one.task_name]))
            for one in app.schedules
        ]

    def tick(self) -> float:
        """Enqueue what is due; returns the seconds until that is to be done again."""
        now_at = self._broker.time()
        answered = time.monotonic()
        for entry in self._entries:
            self._serve(entry, now_at)
        first = min(self._entries, key=lambda entry: entry.due_at, default=None)
        if first is None:
            self._say("no schedules, nothing to do")
            return LOOK
        self._say(f"next {first.schedule.task_name} at {_utc(first.due_at)}")
        wait = first.due_at - now_at - (time.monotonic() - answered)
        return min(max(wait, 0.0), LOOK)

    def _serve(self, entry: _Entry, now_at: float) -> None:
        schedule = entry.schedule
        if now_at - entry.due_at > STALL:  # as it is at the start, too
            missed = schedule.previous_tick(now_at)
            is_fresh = now_at - missed < GRACE
            entry.due_at = missed if is_fresh else schedule.next_tick(now_at)
        while entry.due_at <= now_at:
            try:
                self._fire(entry, now_at)
            except OUTAGES:
                raise  # the tick stays due
            except RedisError:  # such as a key that holds something else: the other schedules go on
                logger.exception("%r cannot be enqueued: its tick is skipped", schedule)
            entry.due_at = schedule.next_tick(entry.due_at)

    def _fire(self, entry: _Entry, now_at: float) -> None:
        schedule, tick = entry.schedule, entry.due_at
        name, when = schedule.task_name, _utc(tick)
        if self._broker.fire(entry.queue, entry.identity, tick, schedule.payload, REMEMBER):
            logger.info("Enqueued %s of %s, %.3f s late", name, when, now_at - tick)
        else:
            logger.debug("%s of %s was enqueued before", name, when)

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            logger.debug("%s", text)
            self._show(f"wakaq-scheduler: {text}")


def _utc(moment: float) -> str:
    """Return a unix time to the minute, or to the second if it has one."""
    text = datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{text.removesuffix(':00')}Z"
