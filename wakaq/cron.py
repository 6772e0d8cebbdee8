"""A periodic task: when it is due. Not for enqueueing it: that is for `scheduler`."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, tzinfo
from math import floor
from typing import Any

from wakaq.errors import ConfigError
from wakaq.message import Message
from wakaq.queue import Queue
from wakaq.task import Task

_MOST_FIELDS = 6


class CronTask:
    """A call of a task whenever a cron expression matches.

    Args:
        schedule: Five fields, a sixth one last for seconds, or `@hourly` and the like.
        task_name: The task, or its name.
        queue: Where to; by default the task's own queue.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        timezone: The IANA name of the zone in which the expression is meant, by default UTC. Where
            clocks change, croniter's rules hold: a moment that is skipped fires when the hour
            ends, one that comes twice fires twice.

    Raises:
        ConfigError: The expression is not valid or never matches, the zone is unknown, or an
            argument cannot be sent.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - each is an option
        self,
        schedule: str,
        task_name: str | Task[..., Any],
        queue: str | Queue | None = None,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        timezone: str | None = None,
    ) -> None:
        name = getattr(task_name, "name", task_name)
        where = f"schedule {schedule!r} of {name!r}"
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{where}: give a task or its name")
        if not isinstance(args or [], list | tuple) or not isinstance(kwargs or {}, dict):
            raise ConfigError(f"{where}: args={args!r}, kwargs={kwargs!r}: give a list and a dict")
        self.schedule = str(schedule)
        self.task_name = name
        self.queue = queue
        self.args = list(args or [])
        self.kwargs = dict(kwargs or {})
        self.timezone = timezone
        self._zone = UTC if timezone is None else _zone(where, timezone)
        # A field at random would be another moment each time croniter is asked, and a seventh field
        # would be a year.
        if re.search(r"(^|\s)[rR]", self.schedule) or len(self.schedule.split()) > _MOST_FIELDS:
            raise ConfigError(f"{where}: give 5 fields, or 6 with seconds last, and none at random")
        try:
            self.next_tick(0.0)
            self.payload = Message(name, self.args, self.kwargs).encode()
        except (TypeError, ValueError) as error:  # croniter's errors derive from ValueError
            raise ConfigError(f"{where}: {error}") from error

    def __repr__(self) -> str:
        return f"CronTask({self.schedule!r}, {self.task_name!r})"

    @classmethod
    def create(cls, spec: Any) -> "CronTask":
        """Make one of any form that `WakaQ(schedules=…)` takes; raise ConfigError for another."""
        match spec:
            case CronTask():
                return spec
            case (schedule, task, *arguments) if len(arguments) <= 2:  # noqa: PLR2004 - args, kwargs
                return cls(schedule, task, None, *arguments)
            case _:
                remedy = "give a CronTask or (cron, task[, args[, kwargs]])"
                raise ConfigError(f"schedule {spec!r}: {remedy}")

    @property
    def identity(self) -> str:
        """A text that is the same for the same schedule, task and arguments on every machine.

        It is fit for a Redis key.
        """
        parts = (self.schedule.encode(), (self.timezone or "").encode(), self.payload)
        digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
        return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', self.task_name)[:50]}-{digest}"

    def next_tick(self, after: float) -> float:
        """Return the first tick later than `after`, both in unix seconds."""
        # Ticks are whole seconds, and croniter's own rounding of fractions differs between its two
        # directions.
        return float(self._iterator(floor(after)).get_next(float))

    def previous_tick(self, at: float) -> float:
        """Return the last tick not later than `at`, both in unix seconds."""
        return float(self._iterator(floor(at) + 1).get_prev(float))

    def _iterator(self, moment: float) -> Any:
        """Return croniter's iterator from a moment in unix seconds."""
        # Imported here, as zoneinfo below, so that an application without schedules does not pay
        # for it.
        from croniter import croniter  # noqa: PLC0415

        return croniter(self.schedule, datetime.fromtimestamp(moment, self._zone))


def _zone(where: str, name: str) -> tzinfo:
    from zoneinfo import ZoneInfo  # noqa: PLC0415

    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, TypeError, OSError) as error:
        remedy = 'give an IANA name such as "Europe/Berlin", or run: pip install tzdata'
        raise ConfigError(f"{where}: timezone={name!r} is unknown: {remedy}") from error
