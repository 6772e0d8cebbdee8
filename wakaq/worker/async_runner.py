"""Runs async tasks on an event loop in a thread of its own, many at once. Not for sync tasks, which it never waits for.

How many it is given at once is the dispatcher's part. Hard timeouts are the supervisor's; a soft one cancels the one task.
"""

import asyncio
import inspect
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from wakaq.errors import NotAMessage, SoftTimeout
from wakaq.frames import STARTED
from wakaq.log import current
from wakaq.message import Message, name_of
from wakaq.task import Task
from wakaq.worker.executor import Executor, Item
from wakaq.worker.verdict import failed, garbled

logger = logging.getLogger("wakaq.worker")


class AsyncRunner:
    """The event loop and its thread, which starts with the first async task."""

    def __init__(self, executor: Executor) -> None:
        # Fixed.
        self._executor = executor
        self._app = executor.app
        self._names = frozenset(name for name, task in self._app.tasks.items() if task.is_async)

        # Control thread only, but for tests of truth.
        self._loop: asyncio.AbstractEventLoop | None = None

        # Event loop's thread only.
        self._running: set[asyncio.Task[None]] = set()
        self._is_flush_due = False

    def take(self, items: list[Item]) -> list[Item]:
        """Start the async ones of these messages; returns the others."""
        if not self._names:
            return items
        ours = [item for item in items if name_of(item.payload) in self._names]
        if ours:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(
                    target=self._loop.run_forever, name="wakaq-async", daemon=True
                ).start()
            self._loop.call_soon_threadsafe(self._start, ours)
        return [item for item in items if item not in ours] if ours else items

    def _start(self, items: list[Item]) -> None:
        for item in items:
            running = asyncio.ensure_future(self._process(item))
            self._running.add(running)
            running.add_done_callback(self._running.discard)

    async def _process(self, item: Item) -> None:
        executor, app = self._executor, self._app
        try:
            message = Message.decode(item.payload)
        except NotAMessage as error:
            executor.settle(item.slot, garbled(item.payload, error, executor.name))
            return
        task = app.tasks[message.name]
        policy = app.policy(task, executor.queue_of(item, task))
        current.set(message)  # a context of its own: each asyncio task has one
        progress, slot = executor.progress, item.slot
        progress.states[slot] = STARTED
        if policy.hard_timeout:
            progress.hard_deadlines[slot] = time.monotonic() + policy.hard_timeout
        failure = await self._call(task, message, policy.soft_timeout)
        progress.hard_deadlines[slot] = 0.0
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

    async def _call(
        self, task: Task[..., Any], message: Message, soft: float | None
    ) -> BaseException | None:
        """Run a task with its hooks; returns what it raised."""
        error: BaseException | None = None
        try:
            for hook in self._app.before_task_started_hooks:
                await _complete(hook)
            error = await self._interruptible(
                self._app.callable_for(task)(*message.args, **message.kwargs), soft
            )
        # Broad, and wider than Exception: whatever a task raises is that task's, and the loop goes on with the others.
        except BaseException as caught:  # noqa: BLE001
            error = caught
        for hook in self._app.after_task_finished_hooks:
            try:
                await _complete(hook)
            except Exception:
                logger.exception("after_task_finished hook %s failed", hook)
        return error

    async def _interruptible(self, call: Any, soft: float | None) -> BaseException | None:
        limit = asyncio.timeout(soft)
        try:
            async with limit:
                await call
        except TimeoutError as error:
            if not limit.expired():
                return error
            timeout = SoftTimeout("the task ran into its soft timeout")
            timeout.__cause__ = error
            return timeout
        return None


async def _complete(hook: Callable[[], Any]) -> None:
    result = hook()
    if inspect.isawaitable(result):
        await result
