"""Runs async tasks on the worker's event loop, many at once.

Not for sync tasks, which it never waits for. It is given more than may run at once, and so need not
wait for the next ones. Hard timeouts are the supervisor's; a soft one cancels the one task.
"""

import asyncio
import inspect
import logging
import sys
import threading
import time
from contextvars import copy_context
from functools import cached_property, partial

from wakaq.errors import SoftTimeout
from wakaq.hooks import AnyTask, acomplete, arun_between
from wakaq.log import current
from wakaq.message import Message
from wakaq.progress import ASSIGNED, ROWS, STARTED
from wakaq.worker.assignments import Assignments, Found, Item
from wakaq.worker.copied import end_copy
from wakaq.worker.outcome import caused_by, failed, unsettled

logger = logging.getLogger("wakaq.worker")


class EventLoop:
    """The loop of tasks and hooks.

    One for both, since what they open, such as a pool of connections, belongs to one loop.
    """

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
            # Broad: what a task has started by itself may call sys.exit(), which asyncio lets
            # through to here.
            except BaseException:
                logger.exception("An asyncio task tried to end the event loop")

    def complete(self, result: object) -> None:
        """Wait for what a hook returned, if that is an awaitable (main thread)."""
        if inspect.isawaitable(result):
            asyncio.run_coroutine_threadsafe(acomplete(result), self.loop).result()


class AsyncRunner:
    """Runs what is in the async backlog; all but `wake` is for the event loop's thread."""

    def __init__(self, assignments: Assignments, loop: asyncio.AbstractEventLoop) -> None:
        self._assignments = assignments
        self._app = assignments.app
        self._progress = assignments.progress
        self._loop = loop
        self._limit = self._app.settings.async_concurrency or ROWS
        # As the hooks of the worker's start left it; not as a sync task may, in whose thread a
        # message can arrive.
        self._context = copy_context()
        self._is_round_due = False

    def wake(self) -> None:
        """Have what waits started (any thread)."""
        self._loop.call_soon_threadsafe(self._round, context=self._context)

    def _round(self) -> None:
        """Report together what has returned since the last round, and start others instead."""
        self._is_round_due = False
        assignments = self._assignments
        assignments.flush()
        while len(assignments.running_async) < self._limit:
            try:
                item = assignments.async_backlog.popleft()
            except IndexError:
                break
            if found := assignments.find(item, is_async=True):
                process, name = self._process(item, found), found[0].name
                task = self._loop.create_task(process, name=name, context=self._context.copy())
                assignments.running_async[item.row] = task
                ended = partial(self._look_after, item)
                task.add_done_callback(ended, context=self._context)

    async def _process(self, item: Item, found: Found) -> None:
        """Run one message to its end, in a context of its own."""
        assignments, progress, row = self._assignments, self._progress, item.row
        message, task, policy = found
        current.set(message)
        if policy.hard_timeout:
            progress.hard_deadlines[row] = time.monotonic() + policy.hard_timeout
        progress.states[row] = STARTED
        error = await self._run(task, message, policy.soft_timeout)
        if assignments.is_copy:  # a hook has forked it
            end_copy(error)
        progress.hard_deadlines[row] = 0.0
        if error is None:
            assignments.finish(row)
        else:
            settlement = failed(item.payload, message, policy, error, assignments.worker)
            assignments.settle(row, settlement)
        del assignments.running_async[row]
        self._have_round()

    def _have_round(self) -> None:
        if not self._is_round_due:
            self._is_round_due = True
            self._loop.call_soon(self._round, context=self._context)

    def _look_after(self, item: Item, task: asyncio.Task[None]) -> None:
        """See to a message whose asyncio task has ended without settling it."""
        assignments, row = self._assignments, item.row
        if assignments.running_async.get(row) is not task:
            return
        del assignments.running_async[row]
        self._have_round()
        if self._progress.states[row] == ASSIGNED:
            # A task cancels all that it finds, and this one had not begun.
            assignments.async_backlog.appendleft(item)
        elif row in assignments.items:  # a bug, or a log that raises
            error = asyncio.CancelledError() if task.cancelled() else task.exception()
            self._progress.hard_deadlines[row] = 0.0
            assignments.settle(row, unsettled(item.payload, error, assignments.worker))

    async def _run(
        self, task: AnyTask, message: Message, soft_timeout: float | None
    ) -> BaseException | None:
        """Run a task between its hooks; cancel it at its soft timeout; return what it raised."""
        app, limit = self._app, asyncio.timeout(soft_timeout)

        async def call() -> None:
            async with limit:
                try:
                    await app.callable_for(task)(*message.args, **message.kwargs)
                finally:
                    if self._assignments.is_copy:
                        end_copy(sys.exception())

        before, after = app.before_task_started_hooks, app.after_task_finished_hooks
        error = await arun_between(before, call, after)
        # One that caught the cancellation and went on may still return, or fail for a reason of its
        # own.
        if limit.expired() and caused_by(error, asyncio.CancelledError):
            soft = SoftTimeout("the task ran into its soft timeout")
            soft.__cause__ = error
            return soft
        return error
