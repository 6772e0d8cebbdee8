"""Runs sync tasks in the main thread, one after another, and reports what became of them. Not for async tasks."""

import logging
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, NamedTuple

from wakaq.app import WakaQ
from wakaq.errors import NotAMessage, SoftTimeout
from wakaq.frames import FINISHED, FREE, Channel, Done, Outcome, Progress
from wakaq.log import current
from wakaq.message import Message
from wakaq.queue import Queue
from wakaq.task import Task
from wakaq.titles import set_title
from wakaq.worker.loop import EventLoop
from wakaq.worker.verdict import Verdict, failed, garbled, unknown

logger = logging.getLogger("wakaq.worker")

REPORT_EVERY = 0.0005  # seconds; tasks shorter than that are reported many at a time
TITLE_EVERY = 0.01  # seconds; a title is not changed more often by tasks shorter than that


class Item(NamedTuple):
    """A message that this worker has been assigned."""

    slot: int
    queue: int
    lane: int
    payload: bytes


class Executor:
    """The main thread's loop; `give`, `take_back`, `flush` and `stop` are for the others."""

    def __init__(
        self, app: WakaQ, number: int, name: str, channel: Channel, progress: Progress
    ) -> None:
        # Fixed.
        self.app = app
        self.number = number
        self.name = name
        self.progress = progress
        # Where reports go: to the supervisor, and after its death to whoever takes its place.
        self.report: Callable[[tuple[Any, ...]], object] = channel.send
        self.loop = EventLoop()

        # Any thread: deques and SimpleQueues need no lock.
        self.items: dict[int, Item] = {}  # by slot: what was assigned and is not reported
        self._backlog: deque[Item] = deque()
        self._done: deque[int] = deque()
        self.stopping = threading.Event()
        self.running: Message | None = None  # written by the main thread
        self.running_async: dict[int, str] = {}  # slot -> name; written by the event loop's thread

        # Main thread only.
        self._busy = 0.0
        self._timed = 0
        self._reported_at = 0.0
        self._titled_at = 0.0
        self._is_armed = False

    # -- any thread --------------------------------------------------------------------------------

    def give(self, items: Iterable[Item], *, is_urgent: bool = False) -> None:
        if is_urgent:
            self._backlog.extendleft(items)
        else:
            self._backlog.extend(items)

    def take_back(self) -> list[Item]:
        """Return what has not been started, and will not be; in order."""
        items: list[Item] = []
        while self._backlog:
            try:
                items.append(self._backlog.pop())
            except IndexError:
                break
        return items[::-1]

    def stop(self) -> None:
        """Have the loop end after the task that is running."""
        self.stopping.set()

    @property
    def is_stopping(self) -> bool:
        return self.stopping.is_set()

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to run, nor a reason to end."""
        return not self._backlog and not self.is_stopping

    def finished(self, slot: int) -> None:
        """Note that a task returned, in memory that a SIGKILL leaves readable."""
        self.progress.states[slot] = FINISHED
        self._done.append(slot)

    def flush(self) -> None:
        """Report what returned."""
        slots: list[int] = []
        while self._done:
            try:
                slot = self._done.popleft()
            except IndexError:
                break
            # Before the report: after it, the slot may be another message's.
            self.items.pop(slot, None)
            slots.append(slot)
        if slots:
            timed, busy = self._timed, self._busy
            self._timed, self._busy = 0, 0.0
            self.report(Done(slots, timed, busy))

    def queue_of(self, item: Item, task: Task[..., Any]) -> Queue:
        """Return the queue that a message came from; for a broadcast, its task's."""
        if item.queue >= 0:
            return self.app.queues[item.queue]
        return self.app.resolve_queue(None, task)

    def show(self) -> None:
        """Say in the process title what is running."""
        running = self.running
        names = [running.name] if running else []
        names += self.running_async.copy().values()
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        what = f"running {names[0]}{more}" if names else "idle"
        set_title(f"wakaq-worker: worker {self.number} {what}")

    # -- main thread -------------------------------------------------------------------------------

    def install_signals(self) -> None:
        signal.signal(signal.SIGUSR2, self._interrupt)
        sys.unraisablehook = self._rearm

    def run(self, wait_for_work: Callable[[], None]) -> None:
        """Run what arrives until told to stop."""
        while not self.stopping.is_set():
            try:
                item = self._backlog.popleft()
            except IndexError:
                self.flush()
                self._show_idle()
                wait_for_work()
            else:
                self._process(item)
        self.flush()

    def _show_idle(self) -> None:
        if self._titled_at:
            self._titled_at = 0.0
            self.show()

    def _process(self, item: Item) -> None:
        slot, payload = item.slot, item.payload
        try:
            message = Message.decode(payload)
        except NotAMessage as error:
            self.settle(slot, garbled(payload, error, self.name))
            return
        task = self.app.tasks.get(message.name)
        if task is None:
            limit = self.app.settings.max_redeliveries
            self.settle(slot, unknown(payload, message, limit, self.name))
            return
        policy = self.app.policy(task, self.queue_of(item, task))
        now = time.monotonic()
        self.running = message
        if now - self._titled_at > TITLE_EVERY:
            self._titled_at = now
            self.show()
        current.set(message)
        self.progress.begin(slot, now, policy.soft_timeout, policy.hard_timeout)
        failure = self._call(task, message)
        ended = time.monotonic()
        if failure is None:
            self.finished(slot)
            self.progress.end()
        else:
            self.progress.end()
            self.settle(slot, failed(payload, message, policy, failure, self.name))
        self.running = None
        current.set(None)
        self._timed += 1
        self._busy += ended - now
        if ended - self._reported_at > REPORT_EVERY:
            self._reported_at = ended
            self.flush()

    def settle(self, slot: int, verdict: Verdict) -> None:
        """Report a task that did not just return."""
        # Before the report: after it, the slot may be another message's.
        self.progress.states[slot] = FREE
        self.items.pop(slot, None)
        self.report(Outcome(slot, *verdict))

    def _call(self, task: Task[..., Any], message: Message) -> BaseException | None:
        """Run a task with its hooks; returns what it raised."""
        app = self.app
        error: BaseException | None = None
        try:
            for hook in app.before_task_started_hooks:
                self.loop.complete(hook())
            error = self._interruptible(app.callable_for(task), message)
        # Broad, and wider than Exception: a task that calls sys.exit() must not end its worker.
        except BaseException as caught:  # noqa: BLE001
            error = caught
        for hook in app.after_task_finished_hooks:
            try:
                self.loop.complete(hook())
            except Exception:
                logger.exception("after_task_finished hook %s failed", hook)
        return error

    def _interruptible(
        self, function: Callable[..., Any], message: Message
    ) -> BaseException | None:
        """Call the task's function: the only code that a SoftTimeout may hit."""
        has_returned = False
        try:
            try:
                self._is_armed = True
                function(*message.args, **message.kwargs)
                has_returned = True
            finally:
                self._is_armed = False
        except SoftTimeout as error:
            # The handler disarms, so this is the only one; if it came between the task's return and our `finally`, the
            # task has done its work.
            return None if has_returned else error
        return None

    # -- soft timeouts (signal handler, main thread) -----------------------------------------------

    def _interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        """Raise SoftTimeout in the running task, if it is this one's deadline that has passed."""
        deadline = self.progress.soft_deadline
        if self._is_armed and 0.0 < deadline <= time.monotonic():
            self._is_armed = False
            self.progress.soft_deadline = 0.0  # the supervisor signals until it is cleared
            raise SoftTimeout("the task ran into its soft timeout")

    def _rearm(self, unraisable: Any) -> None:
        """Raise a SoftTimeout again that Python had to ignore, as it does within `__del__` and in callbacks."""
        if isinstance(unraisable.exc_value, SoftTimeout) and self.running is not None:
            self._is_armed = True
            self.progress.soft_deadline = time.monotonic()
        else:
            sys.__unraisablehook__(unraisable)
