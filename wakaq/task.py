"""A registered function. Not for sending its calls: a task asks its application to, which it knows as a `Sender`."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, overload

from wakaq.errors import ConfigError
from wakaq.queue import Queue
from wakaq.settings import Limits

P = ParamSpec("P")
R = TypeVar("R")
Eta = datetime | timedelta
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class Sender(Protocol):
    """What a task needs of its application; `queue` and `eta` are among the kwargs."""

    def enqueue(self, task: "Task[..., Any]", args: Args, kwargs: Kwargs) -> None: ...
    async def aenqueue(self, task: "Task[..., Any]", args: Args, kwargs: Kwargs) -> None: ...
    def broadcast(self, task: "Task[..., Any]", args: Args, kwargs: Kwargs) -> int: ...


class Task(Limits, Generic[P, R]):
    """A function that can also run on a worker; calling it runs it here and now. Made by `WakaQ.task`."""

    def __init__(
        self, app: Sender, function: Callable[P, R], queue: Queue | None, **limits: Any
    ) -> None:
        name = _check_function(function)
        functools.update_wrapper(self, function)  # first: it copies whatever the function has set
        super().__init__(f"task {name!r}", **limits)
        self.name = name
        self.function = function
        self.queue = queue
        self.is_async = inspect.iscoroutinefunction(function)
        self._app = app
        # What calling it accepts: a decorator's own parameters, not those of what it decorates.
        self._signature = inspect.signature(function, follow_wrapped=False)
        if clash := {"queue", "eta"} & self._signature.parameters.keys():
            raise ConfigError(
                f"task {self.name!r}: parameters named {sorted(clash)} are options of .delay(): rename them"
            )
        self._fewest, self._most = arity(self._signature)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<Task {self.name}>"

    @overload
    def delay(self, *args: P.args, **kwargs: P.kwargs) -> None: ...
    @overload
    def delay(self, *args: Any, queue: str | Queue, eta: Eta = ..., **kwargs: Any) -> None: ...
    @overload
    def delay(self, *args: Any, eta: Eta, **kwargs: Any) -> None: ...
    def delay(self, *args: Any, **kwargs: Any) -> None:
        """Enqueue a call.

        Args:
            *args: The function's arguments.
            **kwargs: The same, and two options: `queue`, a name or a Queue, by default the task's own; and `eta`, before
                which it does not run, a timedelta from now or a datetime (naive: UTC).

        Raises:
            UnknownQueue: The application has no such queue.
            TypeError: The arguments do not fit the function, or one has a type that cannot be sent.
            ValueError: An argument is NaN or infinite, or contains itself.
        """
        self._app.enqueue(self, args, kwargs)

    @overload
    async def adelay(self, *args: P.args, **kwargs: P.kwargs) -> None: ...
    @overload
    async def adelay(
        self, *args: Any, queue: str | Queue, eta: Eta = ..., **kwargs: Any
    ) -> None: ...
    @overload
    async def adelay(self, *args: Any, eta: Eta, **kwargs: Any) -> None: ...
    async def adelay(self, *args: Any, **kwargs: Any) -> None:
        """Enqueue a call without blocking the event loop; all else is as in `delay`."""
        await self._app.aenqueue(self, args, kwargs)

    def using(self, queue: str | Queue | None = None, eta: Eta | None = None) -> "Bound[P]":
        """Return the task with queue and eta chosen: its `delay` has all arguments type-checked."""
        return Bound(self, {"queue": queue, "eta": eta})

    def broadcast(self, *args: P.args, **kwargs: P.kwargs) -> int:
        """Run once on every running `wakaq-worker`; returns how many were reached, raises as `delay` does."""
        return self._app.broadcast(self, args, kwargs)

    def check_arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise TypeError unless the function can be called so."""
        # Binding costs more than all the rest of an enqueue, so it is left out where counting does.
        if kwargs or not self._fewest <= len(args) <= self._most:
            try:
                self._signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{self.name}(): {error}") from None


class Bound(Generic[P]):
    """A task with queue and eta chosen by `using`."""

    def __init__(self, task: Task[P, Any], options: Kwargs) -> None:
        self._task: Task[..., Any] = task
        self._options = options

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Enqueue a call; raises what `Task.delay` does."""
        self._task.delay(*args, **kwargs, **self._options)

    async def adelay(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Enqueue a call without blocking the event loop; raises what `Task.delay` does."""
        await self._task.adelay(*args, **kwargs, **self._options)


def _check_function(function: Any) -> str:
    name = getattr(function, "__name__", None)
    if not callable(function) or isinstance(function, type) or not isinstance(name, str):
        raise ConfigError(f"task {function!r}: only a function can be a task")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigError(f"task {name!r} is a generator, which a call does not run: do not yield")
    return name


def arity(signature: inspect.Signature) -> tuple[float, float]:
    """Return the fewest and the most arguments that fit by position alone; the fewest is infinite if none do."""
    fewest = most = 0.0
    for one in signature.parameters.values():
        if one.kind is one.VAR_POSITIONAL:
            most = math.inf
        elif one.kind is one.KEYWORD_ONLY and one.default is one.empty:
            fewest = math.inf
        elif one.kind in {one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD}:
            most += 1
            fewest += one.default is one.empty
    return fewest, most


def parse_eta(eta: Any) -> tuple[float | None, float | None]:
    """Return an eta as seconds from now or as unix time, both None if it is due already; raise TypeError for another."""
    if eta is None:
        return None, None
    if isinstance(eta, timedelta):
        return (eta.total_seconds(), None) if eta > timedelta() else (None, None)
    if isinstance(eta, datetime):
        return None, (eta if eta.tzinfo else eta.replace(tzinfo=UTC)).timestamp()
    raise TypeError(f"eta={eta!r}: give a datetime (naive: UTC) or timedelta(seconds=…)")
