"""A queue as the application names it. Not for its keys, nor for what waits in it: see `store`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from wakaq.errors import ConfigError
from wakaq.settings import (
    LIMITS,
    Duration,
    RetryDelay,
    RetryOn,
    check_option,
    check_options,
    text,
    whole_number,
)

# No other character, so that no queue's key can be another key.
_name = partial(
    text,
    pattern=r"[A-Za-z0-9_.-]+",
    remedy="use letters, digits, '_', '-' and '.' in its name",
)
_priority = partial(whole_number, least=-(2**31))


@dataclass(eq=False)
class Queue:
    """A queue and what holds for its tasks, unless they say otherwise.

    Args:
        name: Letters, digits, `_`, `-` and `.`.
        priority: Smaller numbers are served first; without one it comes after all that have one.
        prefix: Start of its keys, instead of the application's.
        soft_timeout: Seconds or timedelta; wins over the application's, as all that follow do:
            see `WakaQ`.
        hard_timeout: Seconds or timedelta.
        max_retries: How often.
        retry_on: Exception type, or a tuple of them.
        retry_delay: Seconds, timedelta, or a function of the retry's number.

    Raises:
        ConfigError: One of them is not valid; the message names the queue, the value and the
            remedy.
    """

    name: str
    priority: int | None = None
    prefix: str | None = None
    soft_timeout: Duration | None = None
    hard_timeout: Duration | None = None
    max_retries: int | None = None
    retry_on: RetryOn | None = None
    retry_delay: RetryDelay | None = None

    def __post_init__(self) -> None:
        check_option("queue", self.name, _name)
        owner = f"queue {self.name!r}"
        if self.priority is not None:
            check_option(f"{owner}: priority", self.priority, _priority)
        options = {name: getattr(self, name) for name in ("prefix", *LIMITS)}
        for name, value in check_options(owner, options).items():
            setattr(self, name, value)

    def __repr__(self) -> str:
        return f"Queue({self.name!r}, priority={self.priority})"

    @classmethod
    def create(cls, spec: Any) -> "Queue":
        """Make a queue of any form that `WakaQ(queues=…)` takes; raise ConfigError for another."""
        match spec:
            case Queue():
                return spec
            case str():
                return cls(spec)
            case (str() as name, int() as priority) | (int() as priority, str() as name):
                return cls(name, priority)
            case _:
                remedy = "give a Queue, a (priority, name) pair, or a name"
                raise ConfigError(f"queue {spec!r}: {remedy}")


def in_order(specs: Sequence[Any]) -> list[Queue]:
    """Return the queues by priority, those without one last, in the order in which they are given.

    Raises:
        ConfigError: There are none, one is not valid, or two have one name.
    """
    if not isinstance(specs, list | tuple) or not specs:
        raise ConfigError(f'queues={specs!r}: give a list with at least one, such as ["default"]')
    queues = [Queue.create(spec) for spec in specs]
    names = [queue.name for queue in queues]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"queues: {sorted(twice)} given twice: a name is one queue, drop one")
    with_priority = [queue for queue in queues if queue.priority is not None]
    without = [queue for queue in queues if queue.priority is None]
    return sorted(with_priority, key=lambda queue: queue.priority or 0) + without
