"""Where a worker process begins: sets itself up, and hands over to its threads.

Not for forking it: that is the fork server's part.
"""

import faulthandler
import logging
import os
import signal
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from wakaq.app import WakaQ
from wakaq.channel import Channel, Failed, Ready
from wakaq.log import configure
from wakaq.progress import Progress
from wakaq.titles import set_title
from wakaq.worker.assignments import Assignments
from wakaq.worker.async_runner import EventLoop
from wakaq.worker.control import Control
from wakaq.worker.sync_runner import SyncRunner

logger = logging.getLogger("wakaq.worker")
BOOT_FAILED = 3  # exit status
_OOM_SCORE = "500"  # of -1000 to 1000: the kernel ends workers before what supervises them


def main(  # noqa: PLR0913, PLR0917 - what the supervisor tells a new worker
    app: WakaQ,
    slot: int,
    supervisor_id: str,
    connection: Connection,
    progress_fd: int,
    stacks_fd: int,
) -> None:
    """Run a worker to its end, in a process that was just forked for it.

    Args:
        app: The application, imported by the process that forked this one. Its Redis client makes
            connections of its own in each process.
        slot: The worker's place, from 1 to `concurrency`.
        supervisor_id: Its supervisor's id.
        connection: The worker's end of the pipe, whose other end nobody but the supervisor has.
        progress_fd: Descriptor of the memory for a `Progress`, closed here.
        stacks_fd: Descriptor of the file for stacks.
    """
    _become_a_worker(stacks_fd)
    channel = Channel(connection, is_blocking=True)
    progress = Progress(progress_fd)
    os.close(progress_fd)  # the memory stays
    loop = EventLoop()
    try:
        set_title(f"wakaq-worker: worker {slot} starting")
        assignments = Assignments(app, slot, supervisor_id, progress, channel.send)
        os.register_at_fork(after_in_child=assignments.become_copy)
        runner = SyncRunner(assignments, loop.complete)
        _boot(app, loop)
    # Broad: whatever the application's hook raised, the supervisor is to say it in one line.
    except BaseException as error:
        logger.exception("Worker %d cannot start", slot)
        channel.send(Failed(f"{type(error).__name__}: {error}"))
        raise SystemExit(BOOT_FAILED) from error
    control = Control(channel, assignments, loop, stacks_fd)
    control.start()
    channel.send(Ready())
    assignments.show()
    runner.run(control.listen_when_idle)
    if control.is_orphan:
        control.join()


def _become_a_worker(stacks_fd: int) -> None:
    """Leave behind what belongs to the process that has forked this one."""
    # First: from here on SIGUSR1 writes the stacks of all threads, even while C code holds the GIL.
    faulthandler.register(signal.SIGUSR1, file=stacks_fd, all_threads=True)
    # Its own process group: so killing it kills what its task has started, and Ctrl-C reaches only
    # the supervisor.
    os.setpgid(0, 0)
    # The supervisor ends its workers; a signal for all of a container leaves them time for their
    # tasks. Handlers, and not SIG_IGN: that would be passed on to what a task starts.
    for one in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(one, lambda *_: None)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    with suppress(OSError):  # not Linux, or forbidden
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)


def _boot(app: WakaQ, loop: EventLoop) -> None:
    """Set up what the application may have a say in."""
    log = app.settings
    configure(log.worker_log_level, log.worker_log_file, log.log_format, log.task_log_format)
    for hook in app.after_worker_started_hooks:
        loop.complete(hook())
