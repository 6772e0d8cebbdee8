"""Enqueues periodic tasks when they are due.

Not for saying when that is: `cron` does; nor a process: see `cli`. Any number may run at once:
`Broker.fire` enqueues a tick of a schedule once, for whoever comes first.
"""

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime

from wakaq.app import WakaQ
from wakaq.cron import CronTask
from wakaq.service import Outage, Service
from wakaq.store.broker import Broker
from wakaq.store.connection import RedisError, is_outage

logger = logging.getLogger("wakaq.scheduler")

GRACE = 600.0  # seconds for which a missed tick is enqueued late
# Seconds after which what is due counts as missed: of several missed ticks, the last is enough.
STALL = 10.0
# Seconds after which Redis' clock is read again: it may be set, or be another server's.
CLOCK_CHECK = 30.0
# Seconds for which the last tick is kept in Redis, so that a scheduler that was stopped and
# continued does not repeat it.
TICK_MEMORY = 86_400


class Scheduler(Service):
    """The thread that enqueues all schedules of an application, by the clock of its Redis.

    It runs in a supervisor, or alone.

    Args:
        app: The application.
        broker: What it enqueues with.
        show: Gets a text for the process title that says what comes next.
        outage: Where outages of Redis are noted.
    """

    def __init__(
        self, app: WakaQ, broker: Broker, show: Callable[[str], None], outage: Outage
    ) -> None:
        super().__init__(outage)
        self._app, self._broker, self._show = app, broker, show
        self._shown = ""
        # Each schedule's first tick that has not been enqueued, in unix time; 0.0: not known yet.
        self._next_at: dict[CronTask, float] = dict.fromkeys(app.schedules, 0.0)

    def tick(self, now: float) -> float:
        """Enqueue what is due; returns the seconds until something is due again."""
        redis_at = self._broker.time()
        answered = time.monotonic()
        for schedule in self._next_at:
            self._enqueue_due(schedule, redis_at)
        self._outage.end(now)
        if not self._next_at:
            self._announce("no schedules, nothing to do")
            return CLOCK_CHECK
        due_at, name = min((due_at, one.task_name) for one, due_at in self._next_at.items())
        self._announce(f"next {name} at {_utc(due_at)}")
        wait = due_at - redis_at - (time.monotonic() - answered)
        return min(max(wait, 0.0), CLOCK_CHECK)

    def _enqueue_due(self, schedule: CronTask, redis_at: float) -> None:
        """Enqueue the ticks of a schedule that are due at `redis_at`."""
        if redis_at - self._next_at[schedule] > STALL:  # as it is at the start, too
            missed = schedule.previous_tick(redis_at)
            is_late_only = redis_at - missed < GRACE
            self._next_at[schedule] = missed if is_late_only else schedule.next_tick(redis_at)
        while (tick_at := self._next_at[schedule]) <= redis_at:
            self._enqueue(schedule, tick_at, redis_at)
            self._next_at[schedule] = schedule.next_tick(tick_at)

    def _enqueue(self, schedule: CronTask, tick_at: float, redis_at: float) -> None:
        """Enqueue one tick, unless another scheduler has done so.

        Raises:
            RedisError: Redis is away: the tick stays due.
        """
        name = schedule.task_name
        queue = self._app.resolve_queue(schedule.queue, self._app.tasks[name])
        identity, payload = schedule.identity, schedule.payload
        try:
            if self._broker.fire(queue, identity, tick_at, payload, TICK_MEMORY):
                late = redis_at - tick_at
                logger.info("Enqueued %s of %s, %.3f s late", name, _utc(tick_at), late)
        except RedisError as error:
            if is_outage(error):
                raise
            # Such as a key that holds something else: the other schedules go on.
            logger.exception("%r cannot be enqueued: its tick is skipped", schedule)

    def _announce(self, text: str) -> None:
        if text != self._shown:
            self._shown = text
            logger.debug("%s", text)
            self._show(f"wakaq-scheduler: {text}")


def _utc(moment_at: float) -> str:
    """Return a unix time to the minute, or to the second if it has one."""
    text = datetime.fromtimestamp(moment_at, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{text.removesuffix(':00')}Z"
