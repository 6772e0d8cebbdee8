"""What `wrap_tasks_with` puts around a task, and running one in place. Not for running tasks on workers."""

import asyncio
import functools
import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from typing import Any

from wakaq.errors import ConfigError, WakaQError
from wakaq.task import Task

AnyTask = Task[..., Any]
AnyCallable = Callable[..., Any]
Hooks = Sequence[Callable[[], object]]

_REMEDY = (
    "around an async task, return fn(*args, **kwargs) from a plain def, or await it in an async def"
    " (inspect.iscoroutinefunction(fn) tells the tasks apart)"
)
# Where the call of an async task that goes through a wrapper notes that the wrapper got as far as awaiting it.
_awaited: ContextVar[list[bool] | None] = ContextVar("wakaq_awaited", default=None)


def takes_call(wrapper: AnyCallable) -> bool:
    """Tell the form `wrapper(fn, args, kwargs)` from the decorator `wrapper(fn)`; raise ConfigError for any other."""
    try:
        signature = inspect.signature(wrapper)
        if len(signature.parameters) == 3:  # noqa: PLR2004 - fn, args, kwargs
            return True
        signature.bind("fn")
        is_decorator = not inspect.iscoroutinefunction(wrapper)
    except TypeError:
        is_decorator = False
    if not is_decorator:
        remedy = "write it as a plain def of (fn) that returns a function, or as def or async def"
        raise ConfigError(f"wrap_tasks_with({wrapper!r}): {remedy} of (fn, args, kwargs)")
    return False


def wrap(task: AnyTask, wrapper: AnyCallable | None) -> AnyCallable:
    """Return what runs a task: for an async one it returns an awaitable, any other has run when it returns."""
    function = task.function
    if task.is_async:
        return function if wrapper is None else _wrap_async(task, wrapper)
    if wrapper is not None:
        function = _apply(task, wrapper, function)
    elif not inspect.iscoroutinefunction(inspect.unwrap(function)):
        return function
    # What an async def in a plain decorator or an async wrapper return has not run yet, and nobody would notice.
    return functools.wraps(task.function)(lambda *args, **kw: complete(function(*args, **kw)))


def _apply(task: AnyTask, wrapper: AnyCallable, function: AnyCallable) -> AnyCallable:
    if takes_call(wrapper):
        return lambda *args, **kwargs: wrapper(function, args, kwargs)
    decorated: Any = wrapper(function)
    if not callable(decorated):
        raise WakaQError(f"the wrapper of task {task.name!r} is {decorated!r}: return a function")
    return decorated  # type: ignore[no-any-return]


def _wrap_async(task: AnyTask, wrapper: AnyCallable) -> AnyCallable:
    @functools.wraps(task.function)
    async def function(*args: Any, **kwargs: Any) -> Any:
        if (awaited := _awaited.get()) is not None:
            awaited.append(True)
        return await task.function(*args, **kwargs)

    wrapped = _apply(task, wrapper, function)

    @functools.wraps(task.function)
    async def run(*args: Any, **kwargs: Any) -> Any:
        awaited: list[bool] = []
        token = _awaited.set(awaited)
        try:
            result = await settle(wrapped(*args, **kwargs))
        finally:
            _awaited.reset(token)
        if not awaited:
            raise WakaQError(f"the wrapper of task {task.name!r} did not run it: {_REMEDY}")
        return result

    return run


async def settle(result: Any) -> Any:
    """Return a call's result, once it is there."""
    return await result if inspect.isawaitable(result) else result


def complete(result: Any) -> Any:
    """Return a call's result; if that is an awaitable, run it to its end on an event loop of its own."""
    if not inspect.isawaitable(result):
        return result
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(settle(result))
    with ThreadPoolExecutor(1) as executor:  # a thread that runs one loop cannot run another
        return executor.submit(copy_context().run, asyncio.run, settle(result)).result()


def run_in_place(call: AnyCallable, before: Hooks, after: Hooks) -> None:
    """Run a sync task here, between its hooks."""
    for hook in before:
        complete(hook())
    try:
        complete(call())
    finally:
        for hook in after:
            complete(hook())


async def arun_in_place(call: AnyCallable, before: Hooks, after: Hooks) -> None:
    """Run an async task here, between its hooks, all on one event loop."""
    for hook in before:
        await settle(hook())
    try:
        await call()
    finally:
        for hook in after:
            await settle(hook())
