"""Runs async tasks on the worker's event loop, many at once. Not for sync tasks, which it never waits for.

It is given more than may run at once, and so need not wait for the next ones. Hard timeouts are the supervisor's; a soft
one cancels the one task.
"""

import asyncio
import inspect
import logging
import threading
import time
from contextvars import copy_context
from functools import cached_property

from wakaq.errors import SoftTimeout
from wakaq.frames import SLOTS, STARTED
from wakaq.log import current
from wakaq.message import Message
from wakaq.settings import Policy
from wakaq.worker.executor import Executor, Found, Item
from wakaq.worker.verdict import caused_by, failed
from wakaq.wrapping import AnyTask

logger = logging.getLogger("wakaq.worker")


class EventLoop:
    """The loop of tasks and hooks: what they open, such as a pool of connections, belongs to one loop."""

    @cached_property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop, in a thread of its own that starts when the main thread first needs it."""
        loop = asyncio.new_event_loop()
        threading.Thread(target=self._run, args=(loop,), name="wakaq-async", daemon=True).start()
        return loop

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            try:
                loop.run_forever()
            # Broad: what a task has started by itself may call sys.exit(), which asyncio lets through to here.
            except BaseException:
                logger.exception("An asyncio task tried to end the event loop")

    def complete(self, result: object) -> None:
        """Wait for what a hook returned, if that is an awaitable (main thread)."""
        if inspect.isawaitable(result):
            asyncio.run_coroutine_threadsafe(_completed(result), self.loop).result()


async def _completed(result: object) -> None:
    if inspect.isawaitable(result):
        await result


class AsyncRunner:
    """Runs what is in the executor's async backlog; all but `wake` is for the event loop's thread."""

    def __init__(self, executor: Executor, loop: asyncio.AbstractEventLoop) -> None:
        self._executor = executor
        self._app = executor.app
        self._loop = loop
        self._limit = self._app.settings.async_concurrency or SLOTS
        # As the hooks of the worker's start left it; not as a sync task may, in whose thread a message can arrive.
        self._context = copy_context()
        self._is_round_due = False

    def wake(self) -> None:
        """Have what waits started (any thread)."""
        self._loop.call_soon_threadsafe(self._round, context=self._context)

    def _round(self) -> None:
        """Report together what has returned since the last round, and start as many of those that wait."""
        self._is_round_due = False
        executor = self._executor
        executor.flush()
        while len(executor.running_async) < self._limit:
            try:
                item = executor.async_backlog.popleft()
            except IndexError:
                break
            if found := executor.find(item, is_async=True):
                process, name = self._process(item, found), found[0].name
                task = self._loop.create_task(process, name=name, context=self._context.copy())
                executor.running_async[item[0]] = task

    async def _process(self, item: Item, found: Found) -> None:
        executor, progress, slot = self._executor, self._executor.progress, item[0]
        message, _, policy = found
        current.set(message)
        if policy.hard_timeout:
            progress.hard_deadlines[slot] = time.monotonic() + policy.hard_timeout
        progress.states[slot] = STARTED
        error = await self._call(*found)
        progress.hard_deadlines[slot] = 0.0
        del executor.running_async[slot]
        if error is None:
            executor.finished(slot)
        else:
            executor.settle(slot, failed(item[-1], message, policy, error, executor.name))
        if not self._is_round_due:
            self._is_round_due = True
            self._loop.call_soon(self._round, context=self._context)

    async def _call(self, message: Message, task: AnyTask, policy: Policy) -> BaseException | None:
        """Run a task with its hooks, and cancel it at its soft timeout; returns what it raised."""
        limit = asyncio.timeout(policy.soft_timeout)
        error: BaseException | None = None
        try:
            for hook in self._app.before_task_started_hooks:
                await _completed(hook())
            async with limit:
                await self._app.callable_for(task)(*message.args, **message.kwargs)
        # Broad, and wider than Exception: whatever a task raises is that task's, and the loop goes on with the others.
        except BaseException as caught:  # noqa: BLE001
            error = caught
            # One that caught the cancellation and went on may still return, or fail for a reason of its own.
            if limit.expired() and caused_by(caught, asyncio.CancelledError):
                error = SoftTimeout("the task ran into its soft timeout")
                error.__cause__ = caught
        for hook in self._app.after_task_finished_hooks:
            try:
                await _completed(hook())
            # The latter if the task cancelled itself, and returned.
            except (Exception, asyncio.CancelledError):
                logger.exception("after_task_finished hook %s failed", hook)
        return error
