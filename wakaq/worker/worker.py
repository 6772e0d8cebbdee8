"""Where a worker process begins: sets itself up, and hands over to its threads."""

import faulthandler
import logging
import os
import signal
import socket
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any, NamedTuple

from wakaq.app import WakaQ
from wakaq.frames import Channel, Failed, Progress, Ready
from wakaq.loader import load
from wakaq.log import configure
from wakaq.titles import set_title
from wakaq.worker.control import Control
from wakaq.worker.executor import Executor

logger = logging.getLogger("wakaq.worker")
BOOT_FAILED = 3  # exit status
_OOM_SCORE = "500"  # of -1000 to 1000: the kernel ends workers before what supervises them


class InheritedFile:
    """A descriptor that becomes one of the worker's own when it is sent there with its Spec."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> tuple[Any, ...]:
        return _inherit, (DupFd(self.fd),)


def _inherit(duplicate: Any) -> InheritedFile:
    return InheritedFile(duplicate.detach())


class Spec(NamedTuple):
    """What the supervisor tells a new worker."""

    app: str
    number: int
    worker_id: str
    sock: socket.socket
    memory: Any
    stacks: InheritedFile


def main(spec: Spec) -> None:
    """Run a worker process to its end."""
    # Its own process group: so killing it kills what its task has started, and Ctrl-C reaches only the supervisor.
    os.setpgid(0, 0)
    _set_signals()
    channel = Channel(spec.sock)
    try:
        executor = _boot(spec, channel)
    # Broad: whatever the application's import or hook raised, the supervisor is to say it in one line.
    except BaseException as error:
        logger.exception("Worker %d cannot start", spec.number)
        channel.send(Failed(f"{type(error).__name__}: {error}"))
        raise SystemExit(BOOT_FAILED) from error
    control = Control(channel, executor, spec.worker_id)
    control.start()
    channel.send(Ready())
    executor.show()
    executor.run(control.wait_for_work)
    if control.is_orphan:
        control.join()


def _set_signals() -> None:
    # The supervisor ends its workers; a signal for all of a container leaves them time for their tasks. Handlers, and
    # not SIG_IGN: that would be passed on to what a task starts.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)


def _boot(spec: Spec, channel: Channel) -> Executor:
    set_title(f"wakaq-worker: worker {spec.number} starting")
    app: WakaQ = load(spec.app)
    settings = app.settings
    configure(
        settings.worker_log_level,
        settings.worker_log_file,
        settings.log_format,
        settings.task_log_format,
    )
    faulthandler.register(signal.SIGUSR1, file=spec.stacks.fd, all_threads=True)
    _be_killed_first()
    name = f"{spec.worker_id} worker {spec.number}"
    executor = Executor(app, spec.number, name, channel, Progress(spec.memory))
    executor.install_signals()
    for hook in app.after_worker_started_hooks:
        executor.loop.complete(hook())
    return executor


def _be_killed_first() -> None:
    try:
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)
    except OSError:  # not Linux, or forbidden
        logger.debug("oom_score_adj cannot be set")
