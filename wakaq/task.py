"""A registered function. Not for sending its calls: a task asks its application to."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import update_wrapper
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, overload

from wakaq.errors import ConfigError
from wakaq.queue import Queue
from wakaq.serializer import dumps
from wakaq.settings import Duration, RetryDelay, RetryOn, check_options

P = ParamSpec("P")
R = TypeVar("R")
Eta = datetime | timedelta
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
_MOST_SHAPES = 1_000  # remembered of a task that takes keyword arguments of any name


class Application(Protocol):
    """What a task asks to send its calls: the application."""

    def enqueue(self, task: "Task[..., Any]", args: Args, kwargs: Kwargs) -> None:
        """Do what `Task.delay` promises."""

    async def aenqueue(self, task: "Task[..., Any]", args: Args, kwargs: Kwargs) -> None:
        """Do what `Task.adelay` promises."""

    def broadcast(self, task: "Task[..., Any]", args: Args, kwargs: Kwargs) -> int:
        """Do what `Task.broadcast` promises."""


class Task(Generic[P, R]):
    """A function that can also run on a worker; calling it runs it here and now.

    Made by `WakaQ.task`.
    """

    def __init__(  # noqa: PLR0913 - each is an option
        self,
        app: Application,
        function: Any,  # what the application decorates, which may be no function
        queue: Queue | None,
        *,
        soft_timeout: Duration | None = None,
        hard_timeout: Duration | None = None,
        max_retries: int | None = None,
        retry_on: RetryOn | None = None,
        retry_delay: RetryDelay | None = None,
    ) -> None:
        name = getattr(function, "__name__", None)
        if not callable(function) or isinstance(function, type) or name is None:
            raise ConfigError(f"task {function!r}: only a function can be a task")
        update_wrapper(self, function)  # first, for it copies whatever attributes the function has
        owner = f"task {name!r}"
        limits = {
            "soft_timeout": soft_timeout,
            "hard_timeout": hard_timeout,
            "max_retries": max_retries,
            "retry_on": retry_on,
            "retry_delay": retry_delay,
        }
        for limit, value in check_options(owner, limits).items():
            setattr(self, limit, value)
        self.name: str = name
        self.json_name = dumps(name)
        self.function: Callable[P, R] = function
        self.queue = queue
        self.is_async = inspect.iscoroutinefunction(function)
        self._app = app
        # What calling it accepts: a decorator's own parameters, not those of what it decorates.
        self._signature = inspect.signature(function, follow_wrapped=False)
        # Of calls that were found to fit: the number of positional arguments, and the names.
        self._shapes: set[tuple[object, ...]] = set()
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise ConfigError(f"{owner} is a generator, which a call does not run: do not yield")
        if clash := sorted({"queue", "eta"} & self._signature.parameters.keys()):
            raise ConfigError(
                f"{owner}: parameters named {clash} are options of .delay(): rename them"
            )

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
            **kwargs: The same, and two options: `queue`, a name or a Queue, by default the task's
                own; and `eta`, before which it does not run, a timedelta from now or a datetime
                (naive: UTC).

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
        return Bound(self, queue, eta)

    def broadcast(self, *args: P.args, **kwargs: P.kwargs) -> int:
        """Run once on every running `wakaq-worker`.

        Returns how many were reached; raises as `delay` does.
        """
        return self._app.broadcast(self, args, kwargs)

    def check_arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise TypeError unless the function can be called so."""
        # Only the number and the names of arguments decide, and binding them costs more than all
        # the rest of an enqueue.
        shape = (len(args), *kwargs)
        if shape in self._shapes:
            return
        try:
            self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.name}(): {error}") from None
        if len(self._shapes) < _MOST_SHAPES:
            self._shapes.add(shape)


class Bound(Generic[P]):
    """A task with queue and eta chosen by `using`."""

    def __init__(
        self, task: Task[P, Any], queue: str | Queue | None = None, eta: Eta | None = None
    ) -> None:
        self._task: Task[..., Any] = task
        self._options: Kwargs = {"queue": queue, "eta": eta}

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Enqueue a call; raises what `Task.delay` does."""
        self._task.delay(*args, **kwargs, **self._options)

    async def adelay(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Enqueue a call without blocking the event loop; raises what `Task.delay` does."""
        await self._task.adelay(*args, **kwargs, **self._options)
