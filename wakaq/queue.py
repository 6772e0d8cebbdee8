"""A queue as the application names it. Not for its keys, which `keys` spells, nor for what waits in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from wakaq.errors import ConfigError
from wakaq.settings import Duration, RetryDelay, RetryOn, apply, checked, number, text


@dataclass(eq=False)
class Queue:
    """A queue and what holds for its tasks, unless they say otherwise.

    Args:
        name: Letters, digits, `_`, `-` and `.`.
        priority: Smaller numbers are served first; without one it comes after all that have one.
        prefix: Start of its keys, instead of the application's.
        soft_timeout: Seconds or timedelta; wins over the application's, as all that follow: see `WakaQ`.
        hard_timeout: Seconds or timedelta.
        max_retries: How often.
        retry_on: Exception type, or a tuple of them.
        retry_delay: Seconds, timedelta, or a function of the retry's number.

    Raises:
        ConfigError: One of them is not valid.
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
        # No other character: so no queue's key can be another key.
        remedy = "use letters, digits, '_', '-' and '.' in its name"
        apply(partial(text, pattern=r"[A-Za-z0-9_.-]+", remedy=remedy), self.name, "queue")
        owner = f"queue {self.name!r}"
        if self.priority is not None:
            apply(partial(number, least=-(2**31)), self.priority, f"{owner}: priority")
        vars(self).update(checked(owner, vars(self)))

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
    """Return the queues by priority, those without one last; raise ConfigError if there are none, or two of one name."""
    if not isinstance(specs, list | tuple) or not specs:
        raise ConfigError(f'queues={specs!r}: give a list with at least one, such as ["default"]')
    queues = [Queue.create(spec) for spec in specs]
    names = [queue.name for queue in queues]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"queues: {sorted(twice)} given twice: a name is one queue, drop one")
    # sorted is stable, and False comes before True.
    return sorted(queues, key=lambda queue: (queue.priority is None, queue.priority or 0))
