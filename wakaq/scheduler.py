"""Enqueues periodic tasks when they are due. Not for saying when that is: `cron` does; nor a process: see `cli`.

Any number may run at once: `Broker.fire` enqueues a tick of a schedule once, whoever comes first.
"""

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime

from wakaq.app import WakaQ
from wakaq.broker import Broker
from wakaq.client import OUTAGES, RedisError
from wakaq.cron import CronTask
from wakaq.supervisor.service import Outage, Service

logger = logging.getLogger("wakaq.scheduler")

GRACE = 600.0  # seconds for which a missed tick is enqueued late
STALL = 10.0  # seconds after which what is due counts as missed, and of several missed ticks one is enough
LOOK = 30.0  # seconds between looks at the clock, which may be set or be another server's
REMEMBER = 86_400  # seconds for which no stopped and continued scheduler repeats a tick


class Scheduler(Service):
    """The thread that enqueues all schedules of an application, by the clock of its Redis, in a supervisor or alone.

    `show` gets a text for the process title that says what comes next.
    """

    def __init__(
        self, app: WakaQ, broker: Broker, show: Callable[[str], None], outage: Outage
    ) -> None:
        super().__init__(outage)
        self._app, self._broker, self._show = app, broker, show
        self._said = ""
        # Each schedule's first tick that has not been enqueued; unix time.
        self._due = dict.fromkeys(app.schedules, 0.0)

    def tick(self, now: float) -> float:
        now_at = self._broker.time()
        answered = time.monotonic()
        for schedule in self._due:
            self._serve(schedule, now_at)
        self._outage.end(now)
        if not self._due:
            self._say("no schedules, nothing to do")
            return LOOK
        due_at, name = min((due_at, one.task_name) for one, due_at in self._due.items())
        self._say(f"next {name} at {_utc(due_at)}")
        wait = due_at - now_at - (time.monotonic() - answered)
        return min(max(wait, 0.0), LOOK)

    def _serve(self, schedule: CronTask, now_at: float) -> None:
        name, payload = schedule.task_name, schedule.payload
        queue = self._app.resolve_queue(schedule.queue, self._app.tasks[name])
        if now_at - self._due[schedule] > STALL:  # as it is at the start, too
            missed = schedule.previous_tick(now_at)
            is_fresh = now_at - missed < GRACE
            self._due[schedule] = missed if is_fresh else schedule.next_tick(now_at)
        while (tick := self._due[schedule]) <= now_at:
            try:
                if self._broker.fire(queue, schedule.identity, tick, payload, REMEMBER):
                    logger.info("Enqueued %s of %s, %.3f s late", name, _utc(tick), now_at - tick)
            except OUTAGES:
                raise  # the tick stays due
            except RedisError:  # such as a key that holds something else: the other schedules go on
                logger.exception("%r cannot be enqueued: its tick is skipped", schedule)
            self._due[schedule] = schedule.next_tick(tick)

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            logger.debug("%s", text)
            self._show(f"wakaq-scheduler: {text}")


def _utc(moment: float) -> str:
    """Return a unix time to the minute, or to the second if it has one."""
    text = datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{text.removesuffix(':00')}Z"
