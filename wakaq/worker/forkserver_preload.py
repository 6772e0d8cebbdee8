"""Imported by the fork server before it forks any worker: so the app's memory is loaded once, and shared.

The fork server is a clean process with one thread: no lock that a thread of the supervisor holds can be forked.
"""

import contextlib
import gc
import os
import signal

from wakaq.loader import APP_VARIABLE, load
from wakaq.titles import set_title

set_title("wakaq-worker: fork server")
# Only the supervisor ends it, by ending itself: not a signal for the whole process group or container.
for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
# Whatever it raises: each worker will import it again, fail likewise, and report why.
with contextlib.suppress(BaseException):
    load(os.environ[APP_VARIABLE])
# What is loaded stays: the collector of a worker must not touch, and so copy, these pages.
gc.freeze()
