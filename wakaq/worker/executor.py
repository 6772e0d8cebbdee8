"""Runs sync tasks in the main thread, one after another, and reports what became of tasks of both kinds."""

import asyncio
import logging
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from wakaq.app import WakaQ
from wakaq.errors import NotAMessage, SoftTimeout
from wakaq.frames import FINISHED, FREE, Channel, Done, Outcome, Progress
from wakaq.log import current
from wakaq.message import Message
from wakaq.settings import Policy
from wakaq.titles import set_title
from wakaq.worker.verdict import Verdict, failed, garbled, unknown, worn_out
from wakaq.wrapping import AnyTask

logger = logging.getLogger("wakaq.worker")

REPORT_EVERY = 0.0005  # seconds; tasks shorter than that are reported many at a time
TITLE_EVERY = 0.01  # seconds; a title is not changed more often by tasks shorter than that

Item = tuple[int, int, int, bytes]  # slot, queue, lane and payload of a message
Found = tuple[Message, AnyTask, Policy]


class Executor:
    """The main thread's loop, from `run` on; what is above is for the other threads as well."""

    def __init__(
        self, app: WakaQ, number: int, worker_id: str, channel: Channel, progress: Progress
    ) -> None:
        # Fixed.
        self.app = app
        self.number = number
        self.worker_id = worker_id  # the supervisor's
        self.name = f"{worker_id} worker {number}"
        self.progress = progress

        # Where reports go: to the supervisor, and after its death to whoever takes its place.
        self.report: Callable[[tuple[Any, ...]], object] = channel.send
        self.is_stopping = False  # if set, the loop ends after the task that is running

        # Any thread: deques and dicts need no lock.
        self.items: dict[int, Item] = {}  # by slot: what was assigned and is not reported
        self.backlog: deque[Item] = deque()
        self.async_backlog: deque[Item] = deque()
        self.running_async: dict[int, asyncio.Task[None]] = {}  # by slot
        self._done: deque[int] = deque()
        # Two threads may flush, and sync tasks have to be reported in their order: the supervisor acks them by their count.
        self._flushing = threading.Lock()
        self._known: dict[tuple[str, int, bool], tuple[AnyTask, Policy]] = {}

        # Main thread only.
        self._complete: Callable[[Any], None]
        self._running = ""  # a task's name
        self._timed, self._busy = 0, 0.0
        self._reported_at = self._titled_at = 0.0
        self._is_armed = False  # so that SoftTimeout is raised nowhere but in the task's own code
        signal.signal(signal.SIGUSR2, self._interrupt)
        sys.unraisablehook = self._rearm

    def take_back(self) -> list[Item]:
        """Return what has not been started, and will not be; in order."""
        items: list[Item] = []
        for backlog in (self.async_backlog, self.backlog):
            with suppress(IndexError):
                while True:
                    items.append(backlog.pop())
                    del self.items[items[-1][0]]
        return items[::-1]

    def find(self, item: Item, *, is_async: bool) -> Found | None:
        """Decode a message and find its task; if it cannot be run, settle it and return None."""
        slot, queue, _, payload = item
        try:
            message = Message.decode(payload)
            known = self._known.get((message.name, queue, is_async))
            known = known or self._look_up(message.name, queue, is_async=is_async)
            most = self.app.settings.max_redeliveries
            if known and message.redelivered <= most:
                return message, *known
            current.set(None)  # the message before, to which the log would attribute this
            # Those that took down their supervisor, too, were counted by whoever rescued them.
            verdict = (
                worn_out(payload, message, self.name)
                if known
                else unknown(payload, message, most, self.name)
            )
        except NotAMessage as error:
            current.set(None)
            verdict = garbled(payload, error, self.name)
        self.settle(slot, verdict)
        return None

    def _look_up(self, name: str, index: int, *, is_async: bool) -> tuple[AnyTask, Policy] | None:
        if (task := self.app.tasks.get(name)) is None:
            return None
        if task.is_async is not is_async:
            raise NotAMessage("it has several names")
        # A broadcast came from no queue: its task's counts.
        queue = self.app.queues[index] if index >= 0 else self.app.resolve_queue(None, task)
        return self._known.setdefault((name, index, is_async), (task, self.app.policy(task, queue)))

    def finished(self, slot: int) -> None:
        """Note that a task returned, in memory that a SIGKILL leaves readable; `flush` reports it."""
        self.progress.states[slot] = FINISHED
        self._done.append(slot)

    def flush(self) -> None:
        """Report what returned."""
        slots: list[int] = []
        with self._flushing:
            with suppress(IndexError):
                while True:
                    slots.append(self._done.popleft())
                    # Before the report: after it, the slot may be another's.
                    del self.items[slots[-1]]
            if slots:
                timed, busy = self._timed, self._busy
                self._timed, self._busy = 0, 0.0
                self.report(Done(slots, timed, busy))

    def settle(self, slot: int, verdict: Verdict) -> None:
        """Report a task that did not just return."""
        self.progress.states[slot] = FREE  # before the report, as above
        del self.items[slot]
        self.report(Outcome(slot, *verdict))

    def show(self) -> None:
        """Say in the process title what is running."""
        names = [self._running] if self._running else []
        names += [task.get_name() for task in self.running_async.copy().values()]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        what = f"running {names[0]}{more}" if names else "idle"
        set_title(f"wakaq-worker: worker {self.number} {what}")

    def run(self, wait_for_work: Callable[[], None], complete: Callable[[object], None]) -> None:
        """Run what arrives until told to stop; `complete` waits for what an async hook returned."""
        self._complete = complete
        while not self.is_stopping:
            try:
                item = self.backlog.popleft()
            except IndexError:
                self.flush()
                self._running = ""
                current.set(None)
                if self._titled_at:
                    self._titled_at = 0.0
                    self.show()
                wait_for_work()
            else:
                if found := self.find(item, is_async=False):
                    self._process(item, found)
        self.flush()

    def _process(self, item: Item, found: Found) -> None:
        progress = self.progress
        message, task, policy = found
        slot, hard = item[0], policy.hard_timeout
        began_at = time.monotonic()
        self._running = message.name
        if began_at - self._titled_at > TITLE_EVERY:
            self._titled_at = began_at
            self.show()
        current.set(message)
        progress.begin(slot, began_at, policy.soft_timeout, hard)
        error = self._call(task, message)
        ended_at = time.monotonic()
        progress.end()
        if hard:  # which must not hit an async task that is given the slot
            progress.hard_deadlines[slot] = 0.0
        if error is None:
            self.finished(slot)
        else:
            self.settle(slot, failed(item[-1], message, policy, error, self.name))
        self._timed += 1
        self._busy += ended_at - began_at
        if ended_at - self._reported_at > REPORT_EVERY:
            self._reported_at = ended_at
            self.flush()

    def _call(self, task: AnyTask, message: Message) -> BaseException | None:
        """Run a task with its hooks; returns what it raised."""
        app, error, has_returned = self.app, None, False
        try:
            for hook in app.before_task_started_hooks:
                self._complete(hook())
            function = app.callable_for(task)
            try:
                self._is_armed = True
                function(*message.args, **message.kwargs)
                has_returned = True
            finally:
                self._is_armed = False
        # Broad, and wider than Exception: a task that calls sys.exit() must not end its worker. A SoftTimeout that came
        # between the task's return and our `finally` was too late: the task has done its work.
        except BaseException as caught:  # noqa: BLE001
            error = None if has_returned else caught
        for hook in app.after_task_finished_hooks:
            try:
                self._complete(hook())
            except Exception:
                logger.exception("after_task_finished hook %s failed", hook)
        return error

    def _interrupt(self, *_: object) -> None:
        """Raise SoftTimeout in the running task, if it is this one's deadline that has passed (signal handler)."""
        if self._is_armed and 0.0 < self.progress.soft_deadline <= time.monotonic():
            self._is_armed = False
            self.progress.soft_deadline = 0.0  # the supervisor signals until it is cleared
            raise SoftTimeout("the task ran into its soft timeout")

    def _rearm(self, unraisable: Any) -> None:
        """Raise a SoftTimeout again that Python had to ignore, as it does within `__del__` and in callbacks."""
        if isinstance(unraisable.exc_value, SoftTimeout) and self._running:
            self._is_armed = True
            self.progress.soft_deadline = time.monotonic()
        else:
            sys.__unraisablehook__(unraisable)
