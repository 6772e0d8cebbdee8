"""A queue as the application names it. Not for its keys, which `keys` spells, nor for what waits in it."""

import re
from collections.abc import Sequence
from typing import Any

from wakaq.errors import ConfigError
from wakaq.settings import Duration, Limits, RetryDelay, RetryOn, check_prefix, integer

# No other character: so no queue's key can be another key.
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_LOWEST = -(2**31)


class Queue(Limits):
    """A queue and what holds for its tasks, unless they say otherwise.

    Args:
        name: Letters, digits, `_`, `-` and `.`.
        priority: Smaller numbers are served first; without one it comes after all that have one.
        prefix: Start of its keys, instead of the application's.
        soft_timeout: Wins over the application's, as all that follow; see `WakaQ`.
        hard_timeout: Seconds or timedelta.
        max_retries: How often.
        retry_on: Exception type, or a tuple of them.
        retry_delay: Seconds, timedelta, or a function of the retry's number.

    Raises:
        ConfigError: One of them is not valid.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - each is an option
        self,
        name: str,
        priority: int | None = None,
        prefix: str | None = None,
        soft_timeout: Duration | None = None,
        hard_timeout: Duration | None = None,
        max_retries: int | None = None,
        retry_on: RetryOn | None = None,
        retry_delay: RetryDelay | None = None,
    ) -> None:
        if type(name) is not str or not _NAME.fullmatch(name):
            raise ConfigError(f"queue {name!r}: use letters, digits, '_', '-' and '.' in its name")
        owner = f"queue {name!r}"
        super().__init__(owner, soft_timeout, hard_timeout, max_retries, retry_on, retry_delay)
        if prefix is not None:
            check_prefix(f"{owner}: prefix", prefix)
        self.name = name
        self.priority = integer(priority, f"{owner}: priority", _LOWEST)
        self.prefix = prefix

    def __repr__(self) -> str:
        return f"Queue({self.name!r}, priority={self.priority})"

    @classmethod
    def create(cls, spec: Any) -> "Queue":
        """Make a queue of any form that `WakaQ(queues=…)` takes; raise ConfigError for another."""
        if isinstance(spec, cls):
            return spec
        if isinstance(spec, str):
            return cls(spec)
        match spec:
            case (str() as name, int() as priority) | (int() as priority, str() as name):
                return cls(name, priority)
            case _:
                raise ConfigError(
                    f"queue {spec!r}: give a Queue, a (priority, name) pair, or a name"
                )


def in_order(specs: Sequence[Any]) -> list[Queue]:
    """Return the queues by priority, those without one last; raise ConfigError if there are none, or two of one name."""
    if not isinstance(specs, list | tuple) or not specs:
        raise ConfigError(f'queues={specs!r}: give a list with at least one, such as ["default"]')
    queues = [Queue.create(spec) for spec in specs]
    names = [queue.name for queue in queues]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(
            f"queues: {sorted(twice)} given twice: a name is one queue, drop the other"
        )
    # sorted is stable, and False comes before True.
    return sorted(queues, key=lambda queue: (queue.priority is None, queue.priority or 0))
