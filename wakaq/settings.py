"""The options of an application, checked once, and the policy that follows for a task. Not for doing what they say."""

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from wakaq.concurrency import evaluate
from wakaq.errors import ConfigError

Duration = float | timedelta
RetryOn = type[BaseException] | tuple[type[BaseException], ...]
RetryDelay = Duration | Callable[[int], Duration]

LOG_FORMAT = "[%(asctime)s] %(levelname)s %(process)d: %(message)s"
TASK_LOG_FORMAT = (
    "[%(asctime)s] %(levelname)s %(process)d in %(task)s"
    " args=%(task_args)s kwargs=%(task_kwargs)s retry=%(task_retry)s: %(message)s"
)
LIMITS = ("soft_timeout", "hard_timeout", "max_retries", "retry_on", "retry_delay")
_LONGEST = 10**9  # seconds, 31 years: what every clock and timer can take


def apply(rule: Callable[[Any], Any], value: Any, option: str) -> Any:
    """Return an option's value in its one form, as a rule makes it, or raise ConfigError with the remedy it names."""
    try:
        return rule(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{option}={value!r}: {error}") from error


def number(value: Any, least: int = 0, most: int = 2**31, kind: str = "whole number") -> Any:
    """Return a number; raise ValueError if it is out of bounds, or not whole where it should be."""
    kinds = {int} if kind == "whole number" else {int, float}  # exactly: True is no number
    if type(value) in kinds and least <= value <= most:
        return value
    raise ValueError(f"give a {kind} from {least} to {most}")


def text(value: Any, pattern: str, remedy: str) -> Any:
    """Return a text; raise ValueError if it is none, or not of the pattern."""
    if isinstance(value, str) and re.fullmatch(pattern, value):
        return value
    raise ValueError(remedy)


def _seconds(value: Any, *, zero: bool = False) -> Any:
    length = value.total_seconds() if isinstance(value, timedelta) else value
    if type(length) in {int, float} and (0 < length <= _LONGEST or (zero and length == 0)):
        return length
    least = "0 or more" if zero else "more than 0"
    raise ValueError(f"give a timedelta, or seconds, {least}, at most {_LONGEST}")


def _retry_delay(value: Any) -> Any:
    return value if callable(value) else _seconds(value, zero=True)


def _exceptions(value: Any) -> Any:
    kinds = value if isinstance(value, tuple) else (value,)
    if all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds):
        return kinds
    raise ValueError("give an exception type, or a tuple of them")


def _log_level(value: Any) -> Any:
    names = logging.getLevelNamesMapping()
    level = names.get(str(value).upper(), value)
    if type(level) is int and level >= 0:
        return level
    raise ValueError(f"give one of {', '.join(names)}, or a number")


def _log_format(value: Any, **fields: object) -> Any:
    logging.Formatter(value).format(logging.makeLogRecord({"levelname": "INFO", **fields}))
    return value


_prefix = partial(
    text, pattern="[A-Za-z0-9_.:-]+", remedy="use letters, digits, '_', '-', '.' and ':'"
)
_task_log_format = partial(_log_format, task="", task_args=[], task_kwargs={}, task_retry=0)


@dataclass(frozen=True, slots=True)
class Policy:
    """The timeouts and retries that hold for a task on a queue; durations in seconds."""

    soft_timeout: Annotated[float | None, _seconds]
    hard_timeout: Annotated[float | None, _seconds]
    max_retries: Annotated[int, number]
    retry_on: Annotated[tuple[type[BaseException], ...], _exceptions]
    retry_delay: Annotated[float | Callable[[int], Duration], _retry_delay]

    @classmethod
    def resolve(cls, *levels: object) -> "Policy":
        """Let the first level decide that says anything: the task, then its queue, then the app."""
        chosen: dict[str, Any] = {}
        for name in LIMITS:
            values = (getattr(level, name) for level in levels)
            chosen[name] = next((value for value in values if value is not None), None)
        return Policy(**chosen)

    def check(self, owner: str) -> None:
        """Raise ConfigError unless a task gets its soft timeout before it is killed."""
        soft, hard = self.soft_timeout, self.hard_timeout
        if soft is not None and hard is not None and hard <= soft:
            raise ConfigError(
                f"{owner}: hard_timeout={hard:g} is not above soft_timeout={soft:g}, so it would be killed"
                " before it could react: raise the hard one or lower the soft one"
            )

    def delay_before(self, retry: int) -> float:
        """Return the seconds before the retry of this number (1, 2, …); raises what the application's function does."""
        delay = self.retry_delay(retry) or 0 if callable(self.retry_delay) else self.retry_delay
        return float(apply(_retry_delay, delay, f"retry_delay({retry})"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(Policy):
    """The options of an application, as `WakaQ` documents them, each with its rule; durations in seconds."""

    url: str | None = field(repr=False)  # may hold a password
    host: Annotated[str, partial(text, pattern=".+", remedy="give a name or an address")]
    port: Annotated[int, partial(number, least=1, most=65_535)]
    username: str | None
    password: str | None = field(repr=False)
    db: Annotated[int, number]
    prefix: Annotated[str, _prefix]
    concurrency: Annotated[int, evaluate]
    async_concurrency: Annotated[int, partial(evaluate, minimum=0)]
    exclude_queues: Annotated[tuple[str, ...], tuple]
    max_redeliveries: Annotated[int, number]
    max_mem_percent: Annotated[float | None, partial(number, least=1, most=99, kind="number")]
    max_tasks_per_worker: Annotated[int | None, partial(number, least=1)]
    shutdown_timeout: Annotated[float | None, _seconds]
    dead_letters: Annotated[int, number]
    worker_log_file: str | os.PathLike[str] | None
    scheduler_log_file: str | os.PathLike[str] | None
    worker_log_level: Annotated[int, _log_level]
    scheduler_log_level: Annotated[int, _log_level]
    log_format: Annotated[str, _log_format]
    task_log_format: Annotated[str, _task_log_format]
    socket_timeout: Annotated[float, _seconds]
    socket_connect_timeout: Annotated[float, _seconds]
    health_check_interval: Annotated[float, partial(_seconds, zero=True)]
    wait_timeout: Annotated[float, _seconds]
    synchronous_mode: bool

    @classmethod
    def create(cls, given: dict[str, Any]) -> "Settings":
        """Check the options of `WakaQ`, bring each into one form, and raise ConfigError if one is not valid."""
        kinds = get_type_hints(cls)
        options = {name: given[name] for name in kinds}
        options["log_format"] = options["log_format"] or LOG_FORMAT
        options["task_log_format"] = options["task_log_format"] or TASK_LOG_FORMAT
        for name, kind in kinds.items():
            if options[name] is None and type(None) not in get_args(kind):
                raise ConfigError(f"{name}=None: leave it out for the default")
        settings = cls(**checked("WakaQ", options))
        scheme = (settings.url or "redis:").partition(":")[0]
        if scheme not in {"redis", "rediss", "unix"}:  # not the whole URL: it may hold a password
            raise ConfigError(f"url starts with {scheme!r}: give redis://, rediss:// or unix://")
        if settings.wait_timeout >= settings.socket_timeout:
            raise ConfigError(
                f"wait_timeout={settings.wait_timeout:g} is not below socket_timeout="
                f"{settings.socket_timeout:g}, so every wait would look like an outage: lower it"
            )
        return settings


_RULES = {
    name: get_args(kind)[1]
    for name, kind in get_type_hints(Settings, include_extras=True).items()
    if get_origin(kind) is Annotated
}


def checked(owner: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return options of the app, a queue or a task in one form, None as it is; raise ConfigError for a bad one."""
    result = dict(options)
    for name, value in options.items():
        if value is not None and name in _RULES:
            result[name] = apply(_RULES[name], value, f"{owner}: {name}")
    return result
