"""Runs async tasks on the worker's event loop, many at once. Not for sync tasks, which it never waits for.

How many it is given at once is the dispatcher's part. Hard timeouts are the supervisor's; a soft one cancels the one task.
"""

import asyncio
import inspect
import logging
import time
from collections.abc import Callable
from contextvars import copy_context
from typing import Any

from wakaq.errors import NotAMessage, SoftTimeout
from wakaq.frames import STARTED
from wakaq.log import current
from wakaq.message import Message, name_of
from wakaq.task import Task
from wakaq.worker.executor import TITLE_EVERY, Executor, Item
from wakaq.worker.verdict import caused_by, failed, garbled

logger = logging.getLogger("wakaq.worker")


class AsyncRunner:
    """Takes the messages of async tasks, and reports what became of them."""

    def __init__(self, executor: Executor) -> None:
        # Fixed.
        self._executor = executor
        self._app = executor.app
        self._names = frozenset(name for name, task in self._app.tasks.items() if task.is_async)
        # As the hooks of the worker's start left it; not as a sync task may, in whose thread a message can arrive.
        self._context = copy_context()

        # Event loop's thread only.
        self._running: set[asyncio.Task[None]] = set()
        self._is_flush_due = False
        self._is_title_due = False

    def take(self, items: list[Item]) -> list[Item]:
        """Start the async ones of these messages; returns the others."""
        if not self._names:
            return items
        ours: list[Item] = []
        others: list[Item] = []
        for item in items:
            (ours if name_of(item.payload) in self._names else others).append(item)
        if ours:
            self._executor.loop.call(self._context, self._start, ours)
        return others

    # -- event loop's thread -----------------------------------------------------------------------

    def _start(self, items: list[Item]) -> None:
        loop = asyncio.get_running_loop()
        for item in items:
            running = loop.create_task(self._process(item))  # with a copy of this context
            self._running.add(running)
            running.add_done_callback(self._running.discard)

    async def _process(self, item: Item) -> None:
        executor, slot = self._executor, item.slot
        try:
            message = Message.decode(item.payload)
            if message.name not in self._names:
                raise NotAMessage("it has several names")  # noqa: TRY301 - so that it is judged once
        except NotAMessage as error:
            executor.settle(slot, garbled(item.payload, error, executor.name))
            return
        task = self._app.tasks[message.name]
        policy = self._app.policy(task, executor.queue_of(item, task))
        current.set(message)
        if policy.hard_timeout:
            executor.progress.hard_deadlines[slot] = time.monotonic() + policy.hard_timeout
        executor.progress.states[slot] = STARTED
        executor.running_async[slot] = message.name
        self._show_soon()
        failure = await self._call(task, message, policy.soft_timeout)
        executor.progress.hard_deadlines[slot] = 0.0
        del executor.running_async[slot]
        self._show_soon()
        if failure is None:
            executor.finished(slot)
            self._flush_soon()
        else:
            executor.settle(slot, failed(item.payload, message, policy, failure, executor.name))

    def _flush_soon(self) -> None:
        """Report what returns in this round of the loop together."""
        if not self._is_flush_due:
            self._is_flush_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._is_flush_due = False
        self._executor.flush()

    def _show_soon(self) -> None:
        if not self._is_title_due:
            self._is_title_due = True
            asyncio.get_running_loop().call_later(TITLE_EVERY, self._show)

    def _show(self) -> None:
        self._is_title_due = False
        self._executor.show()

    async def _call(
        self, task: Task[..., Any], message: Message, soft: float | None
    ) -> BaseException | None:
        """Run a task with its hooks; returns what it raised."""
        error: BaseException | None = None
        try:
            for hook in self._app.before_task_started_hooks:
                await _complete(hook)
            function = self._app.callable_for(task)
            error = await _limited(function(*message.args, **message.kwargs), soft)
        # Broad, and wider than Exception: whatever a task raises is that task's, and the loop goes on with the others.
        except BaseException as caught:  # noqa: BLE001
            error = caught
        for hook in self._app.after_task_finished_hooks:
            try:
                await _complete(hook)
            except Exception:
                logger.exception("after_task_finished hook %s failed", hook)
        return error


async def _limited(call: Any, soft: float | None) -> BaseException | None:
    """Await a task's call, and cancel it after so many seconds; returns what it raised."""
    limit = asyncio.timeout(soft)
    try:
        async with limit:
            await call
    # As in `_call`. One that caught the cancellation and went on may still return, or fail for a reason of its own.
    except BaseException as error:  # noqa: BLE001
        if not limit.expired() or not caused_by(error, asyncio.CancelledError):
            return error
        timeout = SoftTimeout("the task ran into its soft timeout")
        timeout.__cause__ = error
        return timeout
    return None


async def _complete(hook: Callable[[], Any]) -> None:
    result = hook()
    if inspect.isawaitable(result):
        await result
