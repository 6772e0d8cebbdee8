"""What runs around a task: its hooks, and what `wrap_tasks_with` puts around it.

There is one sequence of hooks, for sync and async tasks, on workers and in `synchronous_mode`:

1. the hooks of `before_task_started`, in the order of their registration;
2. the task, in its wrapper. It does not run if one of them raised, and neither do the hooks after
   that one: the task has then failed with what was raised, as if it had raised it itself;
3. the hooks of `after_task_finished`, all of them, whatever happened before. What one raises is
   logged, and changes nothing.

That holds for whatever they raise, `SystemExit` and `CancelledError` too. Not for what becomes of a
task that failed: that is for `worker.outcome`.
"""

import asyncio
import functools
import inspect
import logging
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from typing import Any

from wakaq.errors import ConfigError, WakaQError
from wakaq.task import Task

logger = logging.getLogger("wakaq.hooks")

AnyTask = Task[..., Any]
AnyCallable = Callable[..., Any]
Hooks = Sequence[Callable[[], object]]

_FAILED = "after_task_finished hook %s failed"
_REMEDY = (
    "around an async task, return fn(*args, **kwargs) from a plain def, or await it in an async def"
    " (inspect.iscoroutinefunction(fn) tells the tasks apart)"
)
# For the call of an async task that goes through a wrapper: where the task notes that it was run,
# since a wrapper may have made its coroutine and dropped it.
_runs: ContextVar[list[bool] | None] = ContextVar("wakaq_runs", default=None)


# -- the sequence ----------------------------------------------------------------------------------


def run_between(
    before: Hooks, call: Callable[[], object], after: Hooks, complete: Callable[[object], object]
) -> BaseException | None:
    """Run a sync task between its hooks.

    Args:
        before: Hooks to call first.
        call: Runs the task.
        after: Hooks to call last.
        complete: Waits for what a hook returned, if that is an awaitable.

    Returns:
        What the task, or a hook before it, raised; None if it returned.
    """
    error: BaseException | None = None
    try:
        for hook in before:
            complete(hook())
        call()
    # Broad: a task is the application's code, and if it calls sys.exit(), that ends the task alone.
    except BaseException as caught:  # noqa: BLE001
        error = caught
    for hook in after:
        try:
            complete(hook())
        # Broad for the same reason.
        except BaseException:
            logger.exception(_FAILED, hook)
    return error


async def arun_between(
    before: Hooks, call: Callable[[], Awaitable[object]], after: Hooks
) -> BaseException | None:
    """Run an async task between its hooks, all on the running event loop; see `run_between`."""
    error: BaseException | None = None
    try:
        for hook in before:
            await acomplete(hook())
        await call()
    # Broad, as above.
    except BaseException as caught:  # noqa: BLE001
        error = caught
    for hook in after:
        try:
            await acomplete(hook())
        # Broad, as above. It is a CancelledError if the task cancelled itself and returned: that is
        # raised where something waits next.
        except BaseException:
            logger.exception(_FAILED, hook)
    return error


def complete(result: Any) -> Any:
    """Return a call's result; run it to its end on an event loop of its own if it is awaitable."""
    if not inspect.isawaitable(result):
        return result
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(acomplete(result))
    with ThreadPoolExecutor(1) as executor:  # a thread that runs one loop cannot run another
        return executor.submit(copy_context().run, asyncio.run, acomplete(result)).result()


async def acomplete(result: Any) -> Any:
    """Return a call's result; await it, on the running event loop, if it is awaitable."""
    return await result if inspect.isawaitable(result) else result


# -- the wrapper -----------------------------------------------------------------------------------


def takes_call(wrapper: AnyCallable) -> bool:
    """Tell the form `wrapper(fn, args, kwargs)` from the decorator `wrapper(fn)`.

    Raises:
        ConfigError: It has neither form.
    """
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
    """Return what runs a task, in the wrapper if there is one.

    For an async task it returns an awaitable; any other task has run when it returns.

    Raises:
        WakaQError: The wrapper is a decorator that returned no function.
    """
    function = task.function
    if task.is_async:
        return function if wrapper is None else _wrap_async(task, wrapper)
    if wrapper is not None:
        function = _apply(task, wrapper, function)
    elif not inspect.iscoroutinefunction(inspect.unwrap(function)):
        return function
    # An async wrapper, and a plain decorator around an async def, return what has not run yet, and
    # nobody would notice.
    return functools.wraps(task.function)(lambda *args, **kw: complete(function(*args, **kw)))


def _apply(task: AnyTask, wrapper: AnyCallable, function: AnyCallable) -> AnyCallable:
    if takes_call(wrapper):
        return lambda *args, **kwargs: wrapper(function, args, kwargs)
    decorated: object = wrapper(function)
    if not callable(decorated):
        raise WakaQError(f"the wrapper of task {task.name!r} is {decorated!r}: return a function")
    return decorated


def _wrap_async(task: AnyTask, wrapper: AnyCallable) -> AnyCallable:
    @functools.wraps(task.function)
    async def function(*args: Any, **kwargs: Any) -> Any:
        if (runs := _runs.get()) is not None:
            runs.append(True)
        return await task.function(*args, **kwargs)

    wrapped = _apply(task, wrapper, function)

    @functools.wraps(task.function)
    async def run(*args: Any, **kwargs: Any) -> Any:
        runs: list[bool] = []
        token = _runs.set(runs)
        try:
            result = await acomplete(wrapped(*args, **kwargs))
        finally:
            _runs.reset(token)
        if not runs:
            raise WakaQError(f"the wrapper of task {task.name!r} did not run it: {_REMEDY}")
        return result

    return run
