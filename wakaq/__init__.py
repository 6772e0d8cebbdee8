"""WakaQ: runs Python functions in the background, on Redis.

What applications import; nothing is defined here.
"""

import logging

from wakaq.app import WakaQ
from wakaq.cron import CronTask
from wakaq.errors import (
    ConfigError,
    NotAMessage,
    SoftTimeout,
    UnknownQueue,
    UnknownTask,
    WakaQError,
)
from wakaq.queue import Queue
from wakaq.task import Task

__all__ = [
    "ConfigError",
    "CronTask",
    "NotAMessage",
    "Queue",
    "SoftTimeout",
    "Task",
    "UnknownQueue",
    "UnknownTask",
    "WakaQ",
    "WakaQError",
]

logging.getLogger("wakaq").addHandler(logging.NullHandler())
