"""The options of an application, checked once, and the limits that follow for a task.

Each option has a rule beside its field. The app, its queues and its tasks are checked by the same
rules. Not for doing what an option says.
"""

import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from datetime import timedelta
from functools import partial
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from wakaq.concurrency import evaluate
from wakaq.errors import ConfigError

Duration = float | timedelta
RetryOn = type[BaseException] | tuple[type[BaseException], ...]
RetryDelay = Duration | Callable[[int], Duration]
Rule = Callable[[Any], object]  # returns a value in its one form; raises ValueError with the remedy

LOG_FORMAT = "[%(asctime)s] %(levelname)s %(process)d: %(message)s"
TASK_LOG_FORMAT = (
    "[%(asctime)s] %(levelname)s %(process)d in %(task)s"
    " args=%(task_args)s kwargs=%(task_kwargs)s retry=%(task_retry)s: %(message)s"
)
_LARGEST = 2**31
_LONGEST = 10**9  # seconds, 31 years: what every clock and timer can take


def check_option(option: str, value: object, rule: Rule) -> Any:
    """Return an option's value in its one form.

    Raises:
        ConfigError: The rule refuses it; the message names option, value and remedy.
    """
    try:
        return rule(value)
    except ConfigError:  # of a rule that words it all by itself
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{option}={value!r}: {error}") from error


# -- rules -----------------------------------------------------------------------------------------


def whole_number(value: object, least: int = 0, most: int = _LARGEST) -> int:
    """Accept an int within bounds."""
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
        return value
    raise ValueError(f"give a whole number from {least} to {most}")


def text(value: object, pattern: str, remedy: str) -> str:
    """Accept a text of which all matches the pattern."""
    if isinstance(value, str) and re.fullmatch(pattern, value):
        return value
    raise ValueError(remedy)


def _percentage(value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value <= 99:  # noqa: PLR2004
        return value
    raise ValueError("give a number from 1 to 99")


def _duration(value: object) -> float:
    seconds = _seconds(value)
    if seconds is not None and seconds > 0:
        return seconds
    raise ValueError(f"give a timedelta, or seconds, more than 0, at most {_LONGEST}")


def _duration_or_zero(value: object) -> float:
    seconds = _seconds(value)
    if seconds is not None and seconds >= 0:
        return seconds
    raise ValueError(f"give a timedelta, or seconds, 0 or more, at most {_LONGEST}")


def _seconds(value: object) -> float | None:
    """Return a duration in seconds, which may be negative; None if it is none or too long."""
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, int | float) and not isinstance(value, bool) and value <= _LONGEST:
        return value
    return None


def _retry_delay(value: object) -> object:
    return value if callable(value) else _duration_or_zero(value)


def _exceptions(value: object) -> tuple[type[BaseException], ...]:
    kinds = value if isinstance(value, tuple) else (value,)
    if all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds):
        return kinds
    raise ValueError("give an exception type, or a tuple of them")


def _names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        raise ValueError("give a list of names")  # noqa: TRY004 - all rules raise the same
    return tuple(value)


def _url(value: object) -> object:
    if value == "":  # an environment variable that is set to nothing
        return None
    scheme = value.partition(":")[0] if isinstance(value, str) else type(value).__name__
    if scheme not in {"redis", "rediss", "unix"}:
        # Not the whole of it, which may hold a password.
        raise ConfigError(f"url starts with {scheme!r}: give redis://, rediss:// or unix://")
    return value


def _log_level(value: object) -> int:
    names = logging.getLevelNamesMapping()
    level = names.get(str(value).upper(), value)
    if isinstance(level, int) and not isinstance(level, bool) and level >= 0:
        return level
    raise ValueError(f"give one of {', '.join(names)}, or a number")


def _log_format(value: Any, **task_fields: object) -> str:
    record = logging.makeLogRecord({"levelname": "INFO", **task_fields})
    logging.Formatter(value).format(record)  # raises ValueError
    return str(value)


_host = partial(text, pattern=".+", remedy="give a name or an address")
_port = partial(whole_number, least=1, most=65_535)
_prefix = partial(
    text, pattern="[A-Za-z0-9_.:-]+", remedy="use letters, digits, '_', '-', '.' and ':'"
)
_task_log_format = partial(_log_format, task="", task_args=[], task_kwargs={}, task_retry=0)


# -- options ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Policy:
    """The timeouts and retries that hold for a task on a queue; durations in seconds.

    These are the limits that the app, a queue and a task can each set.
    """

    soft_timeout: Annotated[float | None, _duration]
    hard_timeout: Annotated[float | None, _duration]
    max_retries: Annotated[int, whole_number]
    retry_on: Annotated[tuple[type[BaseException], ...], _exceptions]
    retry_delay: Annotated[float | Callable[[int], Duration], _retry_delay]

    @classmethod
    def resolve(cls, *levels: object) -> "Policy":
        """Let the first level decide that says anything: the task, then its queue, then the app.

        Each limit is decided by itself.
        """
        chosen: dict[str, Any] = {}
        for name in LIMITS:
            values = [getattr(level, name) for level in levels]
            chosen[name] = next((value for value in values if value is not None), None)
        return Policy(**chosen)

    def check_timeouts(self, owner: str) -> None:
        """Raise ConfigError unless a task gets its soft timeout before it is killed."""
        soft, hard = self.soft_timeout, self.hard_timeout
        if soft is not None and hard is not None and hard <= soft:
            raise ConfigError(
                f"{owner}: hard_timeout={hard:g} is not above soft_timeout={soft:g}, so it would be"
                " killed before it could react: raise the hard one or lower the soft one"
            )

    def delay_before(self, retry: int) -> float:
        """Return the seconds before the retry of this number (1, 2, …).

        Raises:
            ConfigError: The application's function returned something else than a duration.
            Exception: Whatever that function raises.
        """
        if not callable(self.retry_delay):
            return self.retry_delay
        delay = self.retry_delay(retry) or 0
        return float(check_option(f"retry_delay({retry})", delay, _duration_or_zero))


LIMITS = tuple(one.name for one in fields(Policy))


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(Policy):
    """The options of an application, as `WakaQ` documents them; durations in seconds.

    A field's annotation says whether the option may be None, and has the rule for other values.
    """

    url: Annotated[str | None, _url] = field(repr=False)  # may hold a password
    host: Annotated[str, _host]
    port: Annotated[int, _port]
    username: str | None
    password: str | None = field(repr=False)
    db: Annotated[int, whole_number]
    prefix: Annotated[str, _prefix]
    concurrency: Annotated[int, evaluate]
    async_concurrency: Annotated[int, partial(evaluate, minimum=0)]
    exclude_queues: Annotated[tuple[str, ...], _names]
    max_redeliveries: Annotated[int, whole_number]
    max_mem_percent: Annotated[float | None, _percentage]
    max_tasks_per_worker: Annotated[int | None, partial(whole_number, least=1)]
    shutdown_timeout: Annotated[float | None, _duration]
    dead_letters: Annotated[int, whole_number]
    worker_log_file: Annotated[str | None, os.fspath]
    scheduler_log_file: Annotated[str | None, os.fspath]
    worker_log_level: Annotated[int, _log_level]
    scheduler_log_level: Annotated[int, _log_level]
    log_format: Annotated[str, _log_format]
    task_log_format: Annotated[str, _task_log_format]
    socket_timeout: Annotated[float, _duration]
    socket_connect_timeout: Annotated[float, _duration]
    health_check_interval: Annotated[float, _duration_or_zero]
    wait_timeout: Annotated[float, _duration]
    synchronous_mode: bool

    @classmethod
    def create(cls, **options: Any) -> "Settings":
        """Check the options of `WakaQ` and bring each into its one form.

        Raises:
            ConfigError: One of them is not valid, or two do not fit each other.
        """
        for name, kind in get_type_hints(cls).items():
            if options[name] is None and type(None) not in get_args(kind):
                raise ConfigError(f"{name}=None: leave it out for the default")
        settings = cls(**check_options("WakaQ", options))
        if settings.wait_timeout >= settings.socket_timeout:
            raise ConfigError(
                f"wait_timeout={settings.wait_timeout:g} is not below socket_timeout="
                f"{settings.socket_timeout:g}, so every wait would look like an outage: lower it"
            )
        return settings


_RULES: dict[str, Rule] = {
    name: get_args(kind)[1]
    for name, kind in get_type_hints(Settings, include_extras=True).items()
    if get_origin(kind) is Annotated
}


def check_options(owner: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of the app, a queue or a task, each in its one form; None stays None.

    Raises:
        ConfigError: One of them is not valid.
    """
    checked = dict(options)
    for name, value in options.items():
        if value is not None and name in _RULES:
            checked[name] = check_option(f"{owner}: {name}", value, _RULES[name])
    return checked
