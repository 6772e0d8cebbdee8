"""Where a worker process begins: sets itself up, and hands over to its threads."""

import faulthandler
import logging
import os
import signal
import socket
from contextlib import suppress
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

from wakaq.app import WakaQ
from wakaq.frames import Channel, Failed, Progress, Ready
from wakaq.loader import load
from wakaq.log import configure
from wakaq.titles import set_title
from wakaq.worker.async_runner import EventLoop
from wakaq.worker.control import Control
from wakaq.worker.executor import Executor

logger = logging.getLogger("wakaq.worker")
BOOT_FAILED = 3  # exit status
_OOM_SCORE = "500"  # of -1000 to 1000: the kernel ends workers before what supervises them


class InheritedFile:
    """A descriptor that becomes one of the worker's own when it is sent there."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __getstate__(self) -> Any:
        return DupFd(self.fd)

    def __setstate__(self, duplicate: Any) -> None:
        self.fd = duplicate.detach()


def main(  # noqa: PLR0913, PLR0917 - what the supervisor tells a new worker
    path: str, number: int, worker_id: str, sock: socket.socket, memory: Any, stacks: InheritedFile
) -> None:
    """Run a worker process to its end."""
    # Its own process group: so killing it kills what its task has started, and Ctrl-C reaches only the supervisor.
    os.setpgid(0, 0)
    # The supervisor ends its workers; a signal for all of a container leaves them time for their tasks. Handlers, and
    # not SIG_IGN: that would be passed on to what a task starts.
    for one in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(one, lambda *_: None)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    sock.settimeout(None)  # whatever the application made the default
    channel = Channel(sock)
    loop = EventLoop()
    try:
        set_title(f"wakaq-worker: worker {number} starting")
        executor = Executor(load(path), number, worker_id, channel, Progress(memory))
        faulthandler.register(signal.SIGUSR1, file=stacks.fd, all_threads=True)
        _boot(executor.app, loop)
    # Broad: whatever the application's import or hook raised, the supervisor is to say it in one line.
    except BaseException as error:
        logger.exception("Worker %d cannot start", number)
        channel.send(Failed(f"{type(error).__name__}: {error}"))
        raise SystemExit(BOOT_FAILED) from error
    control = Control(channel, executor, loop)
    control.start()
    channel.send(Ready())
    executor.show()
    executor.run(control.wait_for_work, loop.complete)
    if control.is_orphan:
        control.join()


def _boot(app: WakaQ, loop: EventLoop) -> None:
    log = app.settings
    configure(log.worker_log_level, log.worker_log_file, log.log_format, log.task_log_format)
    with suppress(OSError):  # not Linux, or forbidden
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)
    for hook in app.after_worker_started_hooks:
        loop.complete(hook())
