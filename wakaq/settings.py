"""The options of an application, checked once, and the policy that follows for a task. Not for doing what they say."""

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from wakaq.concurrency import available_cores, evaluate
from wakaq.errors import ConfigError

Duration = float | timedelta
RetryOn = type[BaseException] | tuple[type[BaseException], ...]
RetryDelay = Duration | Callable[[int], Duration]

LOG_FORMAT = "[%(asctime)s] %(levelname)s %(process)d: %(message)s"
TASK_LOG_FORMAT = (
    "[%(asctime)s] %(levelname)s %(process)d in %(task)s"
    " args=%(task_args)s kwargs=%(task_kwargs)s retry=%(task_retry)s: %(message)s"
)

_LONGEST = 10**9  # seconds, 31 years: what every clock and timer can take
_MOST_PERCENT = 99
_DURATIONS = ("socket_timeout", "socket_connect_timeout", "health_check_interval", "wait_timeout")
_OPTIONAL = {
    *("url", "username", "password", "soft_timeout", "hard_timeout", "shutdown_timeout"),
    *("max_mem_percent", "max_tasks_per_worker", "worker_log_file", "scheduler_log_file"),
    *("log_format", "task_log_format"),
}
_RANGES = {
    "port": (1, 65_535),
    "db": (0, 2**31),
    "max_redeliveries": (0, 2**31),
    "dead_letters": (0, 2**31),
    "max_tasks_per_worker": (1, 2**31),
}


def seconds(value: object, option: str, *, zero: bool = False) -> float | None:
    """Return a duration in seconds, None as it is; raise ConfigError unless it is above 0, or 0 if `zero` is true."""
    if value is None:
        return None
    number = value.total_seconds() if isinstance(value, timedelta) else value
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    if is_number and (0 < number <= _LONGEST or (zero and number == 0)):  # type: ignore[operator]
        return float(number)  # type: ignore[arg-type]
    least = "0 or more" if zero else "more than 0"
    raise ConfigError(
        f"{option}={value!r}: give a timedelta, or seconds, {least}, at most {_LONGEST}"
    )


def integer(value: object, option: str, least: int = 0, most: int = 2**31) -> int | None:
    """Return a whole number, None as it is; raise ConfigError if it is out of bounds."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if value is None or (is_int and least <= value <= most):  # type: ignore[operator]
        return value  # type: ignore[return-value]
    raise ConfigError(f"{option}={value!r}: give a whole number from {least} to {most}")


class Limits:
    """Timeouts and retries as one level (task, queue or app) sets them; None leaves them to the next level."""

    def __init__(  # noqa: PLR0913, PLR0917 - each is an option
        self,
        owner: str,
        soft_timeout: Duration | None = None,
        hard_timeout: Duration | None = None,
        max_retries: int | None = None,
        retry_on: RetryOn | None = None,
        retry_delay: RetryDelay | None = None,
    ) -> None:
        self.soft_timeout = seconds(soft_timeout, f"{owner}: soft_timeout")
        self.hard_timeout = seconds(hard_timeout, f"{owner}: hard_timeout")
        _check_order(owner, self.soft_timeout, self.hard_timeout)
        self.max_retries = integer(max_retries, f"{owner}: max_retries")
        self.retry_on = retry_on if isinstance(retry_on, tuple | None) else (retry_on,)
        kinds: tuple[object, ...] = self.retry_on or ()
        for kind in kinds:
            if not (isinstance(kind, type) and issubclass(kind, BaseException)):
                raise ConfigError(f"{owner}: retry_on={kind!r}: give exception types")
        self.retry_delay: float | Callable[[int], Duration] | None = (
            retry_delay
            if callable(retry_delay)
            else seconds(retry_delay, f"{owner}: retry_delay", zero=True)
        )


def _check_order(owner: str, soft: float | None, hard: float | None) -> None:
    """Raise ConfigError unless a task gets its soft timeout before it is killed."""
    if soft is not None and hard is not None and hard <= soft:
        raise ConfigError(
            f"{owner}: hard_timeout={hard:g} is not above soft_timeout={soft:g}, so it would be killed"
            " before it could react: raise the hard one or lower the soft one"
        )


@dataclass(frozen=True, slots=True)
class Policy:
    """The timeouts and retries that hold for a task on a queue; durations in seconds."""

    soft_timeout: float | None
    hard_timeout: float | None
    max_retries: int
    retry_on: tuple[type[BaseException], ...]
    retry_delay: float | Callable[[int], Duration]

    @classmethod
    def resolve(cls, app: "Settings", queue: Limits, task: Limits | None = None) -> "Policy":
        """Let the task decide, then its queue, then the app."""
        chosen: dict[str, Any] = {}
        for name in (one.name for one in fields(cls)):
            values = (getattr(level, name, None) for level in (task, queue, app))
            chosen[name] = next((value for value in values if value is not None), None)
        return cls(**chosen)

    def check(self, owner: str) -> None:
        """Raise ConfigError unless the hard timeout leaves room for the soft one."""
        _check_order(owner, self.soft_timeout, self.hard_timeout)

    def delay_before(self, retry: int) -> float:
        """Return how many seconds to wait before the retry of this number (1, 2, …).

        Raises:
            ConfigError: The application's function returned no duration. What else it raises comes out, too.
        """
        if not callable(self.retry_delay):
            return self.retry_delay
        return seconds(self.retry_delay(retry), f"retry_delay({retry})", zero=True) or 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The options of an application, as `WakaQ` documents them; durations in seconds."""

    url: str | None = field(repr=False)  # may hold a password
    host: str
    port: int
    username: str | None
    password: str | None = field(repr=False)
    db: int
    prefix: str
    concurrency: int
    async_concurrency: int
    exclude_queues: tuple[str, ...]
    soft_timeout: float | None
    hard_timeout: float | None
    max_retries: int
    retry_on: tuple[type[BaseException], ...]
    retry_delay: float | Callable[[int], Duration]
    max_redeliveries: int
    max_mem_percent: float | None
    max_tasks_per_worker: int | None
    shutdown_timeout: float | None
    dead_letters: int
    worker_log_file: str | os.PathLike[str] | None
    scheduler_log_file: str | os.PathLike[str] | None
    worker_log_level: int
    scheduler_log_level: int
    log_format: str
    task_log_format: str
    socket_timeout: float
    socket_connect_timeout: float
    health_check_interval: float
    wait_timeout: float
    synchronous_mode: bool

    @classmethod
    def create(cls, **options: Any) -> "Settings":
        """Check the options of `WakaQ`, bring each into one form, and raise ConfigError if one is not valid."""
        for name, value in options.items():
            if value is None and name not in _OPTIONAL:
                raise ConfigError(f"{name}=None: leave it out for the default")
        limits = Limits("WakaQ", *(options[one.name] for one in fields(Policy)))
        options |= {one.name: getattr(limits, one.name) for one in fields(Policy)}
        for name in ("shutdown_timeout", *_DURATIONS):
            options[name] = seconds(options[name], name, zero=name == "health_check_interval")
        for name, (least, most) in _RANGES.items():
            integer(options[name], name, least, most)
        cores = available_cores()
        for name, least in (("concurrency", 1), ("async_concurrency", 0)):
            options[name] = evaluate(options[name], cores, name, least)
        for name in ("worker_log_level", "scheduler_log_level"):
            options[name] = _log_level(options[name], name)
        for name, default in (("log_format", LOG_FORMAT), ("task_log_format", TASK_LOG_FORMAT)):
            options[name] = _log_format(options[name] or default, name)
        check_prefix("prefix", options["prefix"])
        options["exclude_queues"] = tuple(options["exclude_queues"])
        _check(**options)
        return cls(**options)


def _check(
    url: Any,
    host: Any,
    max_mem_percent: Any,
    wait_timeout: float,
    socket_timeout: float,
    **_: Any,
) -> None:
    # Not the whole URL in the message: it may hold a password.
    if url is not None and (scheme := urlsplit(url).scheme) not in {"redis", "rediss", "unix"}:
        raise ConfigError(f"url starts with {scheme!r}: give one of redis://, rediss:// or unix://")
    if not isinstance(host, str) or not host:
        raise ConfigError(f"host={host!r}: give a name or an address")
    percent = 1 if max_mem_percent is None else max_mem_percent
    if type(percent) not in {int, float} or not 1 <= percent <= _MOST_PERCENT:
        raise ConfigError(f"max_mem_percent={percent!r}: give a number from 1 to 99")
    if wait_timeout >= socket_timeout:
        raise ConfigError(
            f"wait_timeout={wait_timeout:g} is not below socket_timeout={socket_timeout:g}, so every"
            " wait for work would look like an outage: lower it"
        )


def check_prefix(option: str, prefix: Any) -> None:
    """Raise ConfigError if a prefix could spoil the form of keys."""
    if not isinstance(prefix, str) or not re.fullmatch(r"[A-Za-z0-9_.:-]+", prefix):
        raise ConfigError(f"{option}={prefix!r}: use letters, digits, '_', '-', '.' and ':'")


def _log_format(log_format: str, option: str) -> str:
    record = logging.makeLogRecord({"levelname": "INFO"})
    if option == "task_log_format":
        record.__dict__.update(task="", task_args=[], task_kwargs={}, task_retry=0)
    try:
        logging.Formatter(log_format).format(record)
    except (ValueError, TypeError) as error:
        remedy = "use the fields of logging.LogRecord, and %(task)s, %(task_args)s, %(task_kwargs)s"
        message = f"{option}={log_format!r}: {error}; {remedy}, %(task_retry)s in task_log_format"
        raise ConfigError(message) from error
    return log_format


def _log_level(level: Any, option: str) -> int:
    names = logging.getLevelNamesMapping()
    number = names.get(level.upper()) if isinstance(level, str) else level
    if isinstance(number, int) and not isinstance(number, bool) and number >= 0:
        return number
    raise ConfigError(f"{option}={level!r}: give one of {', '.join(names)}, or a number")
