"""Runs sync tasks in the main thread, one after another.

Not for async tasks, nor for hearing what the supervisor sends. Signals need the main thread: a soft
timeout is an exception that a signal handler raises in the running task.
"""

import signal
import sys
import time
from collections.abc import Callable
from contextvars import copy_context
from typing import Any

from wakaq.errors import SoftTimeout
from wakaq.hooks import AnyTask, run_between
from wakaq.log import current
from wakaq.message import Message
from wakaq.worker.assignments import Assignments, Item
from wakaq.worker.copied import end_copy
from wakaq.worker.outcome import failed

REPORT_EVERY = 0.0005  # seconds; tasks shorter than that are reported many at a time
TITLE_EVERY = 0.01  # seconds; a title is not changed more often by tasks shorter than that


class SyncRunner:
    """The main thread's loop; all of it is for that thread.

    `complete` waits for what an async hook returned.
    """

    def __init__(self, assignments: Assignments, complete: Callable[[Any], object]) -> None:
        self._assignments = assignments
        self._app = assignments.app
        self._progress = assignments.progress
        self._before = self._app.before_task_started_hooks
        self._after = self._app.after_task_finished_hooks
        self._complete = complete
        self._reported_at = self._titled_at = 0.0
        self._task: AnyTask  # the one that runs, as is the message
        self._message: Message
        self._has_returned = False  # the task did, whatever came after
        self._is_armed = False  # so that SoftTimeout is raised nowhere but in the task's own code
        signal.signal(signal.SIGUSR2, self._interrupt)
        sys.unraisablehook = self._raise_again

    def run(self, wait_for_work: Callable[[], None]) -> None:
        """Run what arrives until told to stop."""
        assignments = self._assignments
        while not assignments.is_stopping:
            try:
                item = assignments.backlog.popleft()
            except IndexError:
                self._note_idle()
                wait_for_work()
            else:
                # A context of its own, so that what a task sets there is not seen by the next.
                copy_context().run(self._process, item)
        self._note_idle()

    def _note_idle(self) -> None:
        assignments = self._assignments
        assignments.flush()
        assignments.running_sync = ""
        if self._titled_at:
            self._titled_at = 0.0
            assignments.show()

    def _process(self, item: Item) -> None:
        """Run one message to its end."""
        assignments, progress, row = self._assignments, self._progress, item.row
        found = assignments.find(item, is_async=False)
        if found is None:
            return
        message, task, policy = found
        started_at = time.monotonic()
        assignments.running_sync = message.name
        if started_at - self._titled_at > TITLE_EVERY:
            self._titled_at = started_at
            assignments.show()
        current.set(message)
        progress.begin(row, started_at, policy.soft_timeout, policy.hard_timeout)
        self._task, self._message, self._has_returned = task, message, False
        error = run_between(self._before, self._call, self._after, self._complete)
        if assignments.is_copy:  # a hook has forked it
            end_copy(error)
        ended_at = time.monotonic()
        progress.end(row)
        assignments.ended_sync += 1
        assignments.seconds_sync += ended_at - started_at
        # A SoftTimeout that came between the task's return and the end of `_call` was too late.
        if error is None or self._has_returned:
            assignments.finish(row)
        else:
            settlement = failed(item.payload, message, policy, error, assignments.worker)
            assignments.settle(row, settlement)
        if ended_at - self._reported_at > REPORT_EVERY:
            self._reported_at = ended_at
            assignments.flush()

    def _call(self) -> None:
        """Run the task, which alone a soft timeout may interrupt."""
        message = self._message
        function = self._app.callable_for(self._task)
        try:
            self._is_armed = True
            function(*message.args, **message.kwargs)
            self._has_returned = True
        finally:
            self._is_armed = False
            if self._assignments.is_copy:
                end_copy(sys.exception())

    # -- soft timeouts -----------------------------------------------------------------------------

    def _interrupt(self, *_: object) -> None:
        """Raise SoftTimeout in the running task (signal handler).

        Only if it is that task's deadline which has passed: the signal may have been meant for the
        task before.
        """
        if self._is_armed and 0.0 < self._progress.soft_deadline <= time.monotonic():
            self._is_armed = False
            self._progress.soft_deadline = 0.0  # the supervisor signals until it is cleared
            raise SoftTimeout("the task ran into its soft timeout")

    def _raise_again(self, unraisable: Any) -> None:
        """Have a SoftTimeout raised again that Python had to ignore (hook of the interpreter).

        It ignores what is raised within `__del__`, and in callbacks of C code.
        """
        if isinstance(unraisable.exc_value, SoftTimeout) and self._assignments.running_sync:
            self._is_armed = True
            self._progress.soft_deadline = time.monotonic()
        else:
            sys.__unraisablehook__(unraisable)
