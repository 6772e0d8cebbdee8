"""A periodic task: when it is due. Not for enqueueing it: that is `scheduler`'s part."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, tzinfo
from math import floor
from typing import Any, Protocol

from wakaq.errors import ConfigError
from wakaq.message import Message
from wakaq.queue import Queue

_COUNTS = (5, 6)  # fields of an expression
# Where the search for a first match begins: any moment does.
_ANY_MOMENT = datetime(2024, 1, 1, tzinfo=UTC).timestamp()


class Named(Protocol):
    """Something that goes by its name; a `Task` fits."""

    name: str


class CronTask:
    """A call of a task whenever a cron expression matches.

    Args:
        schedule: Five fields, a sixth one last for seconds, or `@hourly` and the like.
        task_name: The task, or its name.
        queue: Where to; by default the task's own queue.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        timezone: The IANA name of the zone in which the expression is meant, by default UTC. Where clocks change, croniter's
            rules hold: a moment that is skipped fires when the hour ends, one that comes twice fires twice.

    Raises:
        ConfigError: The expression is not valid or never matches, the zone is unknown, or an argument cannot be sent.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - each is an option
        self,
        schedule: str,
        task_name: str | Named,
        queue: str | Queue | None = None,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        timezone: str | None = None,
    ) -> None:
        name = getattr(task_name, "name", task_name)
        if not isinstance(name, str) or not name:
            raise ConfigError(f"schedule {schedule!r}: task {task_name!r}: give a task or its name")
        if not isinstance(args or [], list | tuple) or not isinstance(kwargs or {}, dict):
            raise ConfigError(
                f"schedule of {name!r}: args={args!r}, kwargs={kwargs!r}: give a list and a dict"
            )
        self.schedule = schedule
        self.task_name = name
        self.queue = queue
        self.args = list(args or [])
        self.kwargs = dict(kwargs or {})
        self.timezone = timezone
        self._zone = _zone(name, timezone)
        self._check()
        try:
            self.payload = Message(name, self.args, self.kwargs).encode()
        except (TypeError, ValueError) as error:
            raise ConfigError(f"schedule of {name!r}: {error}") from error

    def __repr__(self) -> str:
        return f"CronTask({self.schedule!r}, {self.task_name!r})"

    @classmethod
    def create(cls, spec: Any) -> "CronTask":
        """Make one of any form that `WakaQ(schedules=…)` takes; raise ConfigError for another."""
        if isinstance(spec, cls):
            return spec
        match spec:
            case (schedule, task):
                return cls(schedule, task)
            case (schedule, task, args):
                return cls(schedule, task, args=args)
            case (schedule, task, args, kwargs):
                return cls(schedule, task, args=args, kwargs=kwargs)
            case _:
                raise ConfigError(
                    f"schedule {spec!r}: give a CronTask or (cron, task[, args[, kwargs]])"
                )

    @property
    def identity(self) -> str:
        """A text that is the same for the same schedule, task and arguments on every machine; fit for a Redis key."""
        parts = (self.schedule.encode(), (self.timezone or "").encode(), self.payload)
        digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
        return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', self.task_name)[:50]}-{digest}"

    def next_tick(self, after: float) -> float:
        """Return the first tick later than `after`, both in unix seconds."""
        # Ticks are whole seconds, and croniter's own rounding of fractions differs between its two directions.
        tick: float = self._iterator(floor(after)).get_next(float)
        return tick

    def previous_tick(self, at: float) -> float:
        """Return the last tick not later than `at`, both in unix seconds."""
        tick: float = self._iterator(floor(at) + 1).get_prev(float)
        return tick

    def _iterator(self, moment: float) -> Any:
        # This import and the one below wait: an application without schedules should not pay for them.
        from croniter import croniter  # noqa: PLC0415

        return croniter(self.schedule, datetime.fromtimestamp(moment, self._zone))

    def _check(self) -> None:
        where = f"schedule {self.schedule!r} of {self.task_name!r}"
        if not isinstance(self.schedule, str):
            raise ConfigError(f"{where}: give a cron expression")
        columns = self.schedule.split()
        if not self.schedule.startswith("@") and len(columns) not in _COUNTS:
            raise ConfigError(f"{where}: {len(columns)} fields, give 5, or 6 with seconds last")
        # croniter would roll the dice again at every look.
        if any(column[0] in "rR" for column in columns):
            raise ConfigError(
                f"{where}: random fields differ from scheduler to scheduler, write a number"
            )
        try:
            self.next_tick(_ANY_MOMENT)
        except ValueError as error:  # the base of croniter's own
            raise ConfigError(f"{where} is not valid, or never matches: {error}") from error


def _zone(task_name: str, name: str | None) -> tzinfo:
    if name is None:
        return UTC
    from zoneinfo import ZoneInfo  # noqa: PLC0415

    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise ConfigError(
            f"schedule of {task_name!r}: timezone={name!r} is unknown: give an IANA name such as"
            ' "Europe/Berlin", or run: pip install tzdata'
        ) from error
