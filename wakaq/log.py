"""Sets up logging in WakaQ's own commands.

Not for applications: in a web process WakaQ only logs to its loggers. In the commands everything
goes through the root logger, so that what a task logs with its own loggers is seen, with the task's
name.
"""

import logging
import logging.handlers
import os
from contextvars import ContextVar

from wakaq.errors import ConfigError
from wakaq.message import Message

# The message whose task runs in this context; set by a worker's runners, None between tasks.
current: ContextVar[Message | None] = ContextVar("wakaq_current", default=None)


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
