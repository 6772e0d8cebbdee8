"""What this worker was assigned, until it has reported what became of it.

Shared by the worker's threads. Not for running anything: that is `sync_runner` and `async_runner`.
A message in a worker is in one of these states:

========  ==============================  =====================================================
state     it is in                        it leaves
========  ==============================  =====================================================
waiting   `items`, a backlog              from the left to run, from the right to be given back
running   `items`                         by `finish` if it returned, else by `settle`
finished  `items`, `_finished`            by `flush`, together with others
========  ==============================  =====================================================

A backlog is a deque, from which each message is had by exactly one thread. What becomes of a
message goes to shared memory before it is reported, so that what a SIGKILL leaves behind tells
which tasks were finished, which were running and which had not begun.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import repeat
from typing import NamedTuple

from wakaq.app import WakaQ
from wakaq.channel import Adopted, Assign, Done, Frame, Outcome
from wakaq.errors import NotAMessage
from wakaq.hooks import AnyTask
from wakaq.message import Message, name_of
from wakaq.progress import FINISHED, FREE, Progress
from wakaq.settings import Policy
from wakaq.store.settlement import Settlement
from wakaq.titles import set_title
from wakaq.worker.outcome import exhausted, malformed, unknown

BROADCAST = -1  # instead of the index of a queue


class Item(NamedTuple):
    """A message that was assigned, with where Redis has it."""

    row: int
    queue: int  # the queue's index in the application, or BROADCAST
    number: int  # in the in-flight hash; 0: in none
    supervisor_id: str  # whose in-flight hash that is
    payload: bytes


# As `Item._make`, but without its check of the length: half the time, for each message.
_make_item: Callable[[tuple[object, ...]], Item] = partial(tuple.__new__, Item)
Found = tuple[Message, AnyTask, Policy]


class Assignments:
    """The messages that this worker has, and how to report what becomes of them."""

    def __init__(
        self,
        app: WakaQ,
        slot: int,
        supervisor_id: str,
        progress: Progress,
        report: Callable[[Frame], object],
    ) -> None:
        # Fixed.
        self.app = app
        self.slot = slot
        self.worker = f"{supervisor_id} worker {slot}"  # in dead letters, for people
        self.progress = progress
        self._async_names = {task.name for task in app.tasks.values() if task.is_async}
        self.has_async = bool(self._async_names)
        self._max_redeliveries = app.settings.max_redeliveries

        # Any thread: a deque's methods are atomic. Whoever takes from the last
        # holds the lock.
        self.backlog: deque[Item] = deque()
        self.async_backlog: deque[Item] = deque()
        self._finished: deque[int] = deque()  # rows

        # Any thread: a dict's methods are atomic, too.
        self._known: dict[int, dict[str, tuple[AnyTask, Policy]]] = {
            index: {} for index in (BROADCAST, *range(len(app.queues)))
        }

        # Any thread. Once it is set, no sync task begins, and the main thread ends.
        self.is_stopping = False

        # Whether this is a process that a task has forked; that is set before it runs anything. To
        # ask for the process's id instead would take ten times as long.
        self.is_copy = False

        # Written by the control thread alone: to whom it is reported.
        self.report = report

        # Written by the main thread. Others may see one of the last two before the other, which the
        # next report makes up for.
        self.running_sync = ""  # the task's name
        self.ended_sync = 0  # how many, ever
        self.seconds_sync = 0.0  # which these took together

        # Written by the event loop's thread.
        self.running_async: dict[int, asyncio.Task[None]] = {}  # by row

        # Any thread may read; whoever changes what is in it holds the lock.
        self.items: dict[int, Item] = {}  # by row
        self._lock = threading.Lock()
        self._reported = (0, 0.0)  # what there was of `ended_sync` and `seconds_sync`

    def become_copy(self) -> None:
        """Note that this process was forked from the worker (in the new process)."""
        self.is_copy = True

    # -- from the supervisor (the thread that listens) ---------------------------------------------

    def add(self, frame: Assign) -> bool:
        """Have what is assigned wait; returns whether there are async ones among it."""
        supervisor_id, queue, rows, numbers, payloads, is_urgent = frame
        columns = rows, repeat(queue), numbers, repeat(supervisor_id), payloads
        items = list(map(_make_item, zip(*columns, strict=False)))
        with self._lock:
            self.items.update(zip(rows, items, strict=True))
        extend = deque.extendleft if is_urgent else deque.extend
        if not self.has_async:
            extend(self.backlog, items)
            return False
        sync: list[Item] = []
        others: list[Item] = []
        for item in items:
            (others if name_of(item.payload) in self._async_names else sync).append(item)
        extend(self.backlog, sync)
        extend(self.async_backlog, others)
        return bool(others)

    def take_back(self) -> list[Item]:
        """Return what has not been started, and will not be; in order."""
        items: list[Item] = []
        with self._lock:
            for backlog in (self.async_backlog, self.backlog):
                with suppress(IndexError):
                    while True:
                        items.append(self.items.pop(backlog.pop().row))
        return items[::-1]

    def move(self, frame: Adopted) -> None:
        """Note where Redis has messages since the supervisor got another id.

        What was reported meanwhile is not known here any more, and of no concern.
        """
        with self._lock:
            for row, number in zip(frame.rows, frame.numbers, strict=True):
                if (item := self.items.get(row)) is not None:
                    new = item._replace(supervisor_id=frame.supervisor_id, number=number)
                    self.items[row] = new

    # -- before it runs (the thread that will run it) ----------------------------------------------

    def find(self, item: Item, *, is_async: bool) -> Found | None:
        """Decode a message and find its task; if it cannot be run, settle it and return None."""
        payload, most = item.payload, self._max_redeliveries
        try:
            message = Message.decode(payload)
        except NotAMessage as error:
            self.settle(item.row, malformed(payload, error, self.worker))
            return None
        found = self._known[item.queue].get(message.name) or self._look_up(message, item.queue)
        if found is None:
            settlement = unknown(payload, message, most, self.worker)
        elif found[0].is_async is not is_async:
            settlement = malformed(payload, NotAMessage("it has several names"), self.worker)
        elif message.redelivered > most:
            settlement = exhausted(payload, message, self.worker)
        else:
            return message, *found
        self.settle(item.row, settlement)
        return None

    def _look_up(self, message: Message, index: int) -> tuple[AnyTask, Policy] | None:
        app = self.app
        if (task := app.tasks.get(message.name)) is None:
            return None
        # A broadcast came from no queue: its task's counts.
        queue = app.resolve_queue(None, task) if index == BROADCAST else app.queues[index]
        return self._known[index].setdefault(message.name, (task, app.policy(task, queue)))

    # -- after it ran (the thread that ran it; `flush`: any) ---------------------------------------

    def finish(self, row: int) -> None:
        """Note that a task returned; `flush` reports it."""
        self.progress.states[row] = FINISHED
        self._finished.append(row)

    def settle(self, row: int, settlement: Settlement) -> None:
        """Report a task that did not just return."""
        # Before the report: after it, the row may be another's.
        self.progress.states[row] = FREE
        with self._lock:
            del self.items[row]
        self.report(Outcome.of(row, settlement))

    def flush(self) -> None:
        """Report what returned."""
        finished = self._finished
        if not finished:
            return
        with self._lock:
            rows = [finished.popleft() for _ in range(len(finished))]
            if not rows:  # another thread was faster
                return
            for row in rows:
                del self.items[row]
            count, seconds = self._reported
            self._reported = self.ended_sync, self.seconds_sync
            done = Done(rows, self._reported[0] - count, self._reported[1] - seconds)
        self.report(done)

    # -- for people (any thread) -------------------------------------------------------------------

    def show(self) -> None:
        """Say in the process title what is running."""
        names = [self.running_sync] if self.running_sync else []
        names += [task.get_name() for task in self.running_async.copy().values()]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        what = f"running {names[0]}{more}" if names else "idle"
        set_title(f"wakaq-worker: worker {self.slot} {what}")
