"""Ends a process that a task has forked, where that comes back out of the task.

Such a copy of the worker has its pipe and its assignments. It must report nothing, run no hook and
no other task, and end as the child that it is. Not for what a task starts otherwise: that never
comes here.
"""

import contextlib
import logging
import os
import sys
from typing import NoReturn

logger = logging.getLogger("wakaq.worker")


def end_copy(error: BaseException | None) -> NoReturn:
    """End this process with the exit status that Python gives for `error`; None: it returned."""
    status = 0
    try:
        if isinstance(error, SystemExit) and isinstance(error.code, int | None):
            status = error.code or 0
        elif error is not None:
            status = 1
            logger.error("A process that a task has forked ends", exc_info=error)
        # What it has printed; the rest of an ordinary exit is the worker's.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
    finally:
        os._exit(status)
