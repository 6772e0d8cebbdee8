"""Sets up logging in WakaQ's own commands.

Not for applications: in a web process WakaQ only logs to its loggers. In the commands everything
goes through the root logger, so that what a task logs with its own loggers is seen, with the task's
name. In the supervisor it goes through a queue as well, so that no log can hold up its threads.
"""

import contextlib
import copy
import logging
import logging.handlers
import os
import threading
from collections.abc import Callable
from contextvars import ContextVar
from queue import SimpleQueue
from typing import Any

from wakaq.errors import ConfigError
from wakaq.message import Message

# The message whose task runs in this context; set by a worker's runners, None between tasks.
current: ContextVar[Message | None] = ContextVar("wakaq_current", default=None)

MOST_RECORDS = 10_000  # that wait for a log to take them; what comes then is dropped
FLUSH_WITHIN = 1.0  # seconds that the log has to take what waits, at the end


class _Formatter(logging.Formatter):
    """Formats records by `task_log_format` while a task is running, else by `log_format`."""

    def __init__(self, log_format: str, task_log_format: str) -> None:
        super().__init__(log_format)
        self._in_task = logging.Formatter(task_log_format)

    def format(self, record: logging.LogRecord) -> str:
        message = current.get()
        if message is None:
            return super().format(record)
        record.task = message.name
        record.task_args = message.args
        record.task_kwargs = message.kwargs
        record.task_retry = message.retry
        return self._in_task.format(record)


def configure(
    level: int, file: str | os.PathLike[str] | None, log_format: str, task_log_format: str
) -> None:
    """Send all logging of this process to a file, which may be rotated from outside, or to stderr.

    Handlers that the application added, such as an error tracker's, stay, except those that would
    print a line twice.

    Raises:
        ConfigError: The file cannot be opened.
    """
    handler: logging.Handler = logging.StreamHandler()
    if file:
        try:
            handler = logging.handlers.WatchedFileHandler(file)
        except OSError as error:
            raise ConfigError(f"log file '{file}' cannot be opened: {error}") from error
    handler.setFormatter(_Formatter(log_format, task_log_format))
    handler.name = "wakaq"
    root = logging.getLogger()
    for old in root.handlers[:]:
        if old.name == handler.name or type(old) is logging.StreamHandler:
            root.removeHandler(old)
            old.close()
    root.addHandler(handler)
    root.setLevel(level)


# -- a log that holds nobody up --------------------------------------------------------------------


def start_queue() -> Callable[[], bool]:
    """Have a thread write what this process logs, so that no other waits for, or fails by, a log.

    For the supervisor, once it has forked its fork server: a disk that is full, a terminal that
    nobody reads or an application's handler that raises must delay no kill, lease or shutdown.

    Returns:
        What ends that, after `FLUSH_WITHIN` at the latest. It returns whether all was written: if
        not, the process must end by `os._exit`, as an ordinary exit waits for the log.
    """
    manager = logging.root.manager
    loggers = [one for one in manager.loggerDict.values() if isinstance(one, logging.Logger)]
    queues = []
    for logger in (logging.root, *loggers):
        if any(not isinstance(one, logging.NullHandler) for one in logger.handlers):
            queues.append((logger, logger.handlers[:], _QueueHandler(logger.handlers)))
            logger.handlers[:] = [queues[-1][-1]]

    def end() -> None:
        for logger, handlers, queue in queues:
            queue.close()
            logger.handlers[:] = handlers

    def stop() -> bool:
        thread = threading.Thread(target=end, name="wakaq-log-end", daemon=True)
        thread.start()
        thread.join(FLUSH_WITHIN)
        return not thread.is_alive()

    return stop


class _QueueHandler(logging.handlers.QueueHandler):
    """Has a thread of its own call the real handlers.

    It never waits: the queue is bounded by its length, as a full one would be waited for at the
    end, and it is a SimpleQueue, since a finalizer may log while its thread is logging.
    """

    def __init__(self, handlers: list[logging.Handler]) -> None:
        self._waiting: SimpleQueue[Any] = SimpleQueue()
        super().__init__(self._waiting)
        self.dropped = 0  # ever; changed under the handler's lock
        self._listener: _Listener | None = _Listener(self._waiting, handlers, self)
        self._listener.start()

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Have the text made now, as what it tells of may change; the handlers get all else."""
        copied = copy.copy(record)
        copied.msg, copied.args = record.getMessage(), None
        return copied

    def enqueue(self, record: logging.LogRecord) -> None:
        assert self._listener is not None
        if record.thread == self._listener.thread_id:
            return  # by a handler, which would have something to log again and again
        if self._waiting.qsize() < MOST_RECORDS:
            self._waiting.put_nowait(record)
        else:
            self.dropped += 1

    def handleError(self, _record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Count what cannot be put into words; the ordinary way is to print, which may block."""
        self.dropped += 1

    def close(self) -> None:
        """Return once all is written, however long that takes; `logging.shutdown` does it, too."""
        if self._listener is not None:
            self._listener.stop()
            self._listener = None
        super().close()


class _Listener(logging.handlers.QueueListener):
    """The thread that calls the real handlers, whatever they raise."""

    def __init__(
        self,
        waiting: SimpleQueue[Any],
        handlers: list[logging.Handler],
        queue_handler: _QueueHandler,
    ) -> None:
        super().__init__(waiting, *handlers)
        # Fixed.
        self._waiting = waiting
        self._queue_handler = queue_handler
        # Written by its thread.
        self.thread_id = 0
        self._reported = 0  # of those that were dropped

    def handle(self, record: logging.LogRecord) -> None:
        if not self.thread_id:
            self.thread_id = threading.get_ident()
            threading.current_thread().name = "wakaq-log"
        self._write(record)
        dropped = self._queue_handler.dropped - self._reported
        if dropped and self._waiting.qsize() <= MOST_RECORDS // 2:
            self._reported += dropped
            text = f"Log lines that were dropped, as it did not take them in time: {dropped}"
            level = logging.WARNING
            self._write(logging.LogRecord(__name__, level, __file__, 0, text, None, None))

    def _write(self, record: logging.LogRecord) -> None:
        for handler in self.handlers:
            # Broad: these may be the application's own, and the others are still to be called.
            try:
                if record.levelno >= handler.level:
                    handler.handle(record)
            except BaseException:  # noqa: BLE001
                with contextlib.suppress(BaseException):
                    handler.handleError(record)
