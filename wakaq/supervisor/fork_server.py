"""The fork server: a process without threads, from which workers are forked. Both of its sides.

A worker cannot be forked from the supervisor, where threads hold locks that a fork would copy in
the locked state. So the main thread, having imported the application, forks this server before
there are other threads, and asks it for workers. If it dies, or does not answer, another one is
started, which has to import the application again.

    supervisor ── Fork(slot, supervisor id) + descriptors ──►  fork server  ── fork ──► worker
               ◄── Forked(slot, pid), Ended(pid, status) ────

Not for when to start a worker: the main thread decides.
"""

import contextlib
import gc
import logging
import marshal
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import types
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from wakaq.app import WakaQ
from wakaq.channel import Channel
from wakaq.loader import load
from wakaq.progress import SIZE, Progress
from wakaq.titles import set_title
from wakaq.worker.main import main

logger = logging.getLogger("wakaq.supervisor")

MESSAGE = 1_024  # bytes of each message, filled up: so none needs a length
MOST_REASON = 200  # characters, each at most four bytes
IGNORED = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
DESCRIPTORS = 3  # of a worker: its channel, its progress rows, its stacks
EXIT_WITHIN = 1.0  # seconds that it has to exit by itself


class Forked(NamedTuple):
    """A worker was forked."""

    slot: int
    pid: int


class Ended(NamedTuple):
    """A worker has ended, with this exit status; negative: a signal."""

    pid: int
    status: int


class Started(NamedTuple):
    """The fork server has the application, and takes requests."""


class Broken(NamedTuple):
    """The fork server could not import the application."""

    reason: str


_KINDS: list[Any] = [Forked, Ended, Started, Broken]


class Endpoints(NamedTuple):
    """The supervisor's ends of what it shares with a worker that is being forked."""

    channel: Channel
    progress: Progress
    stacks: int

    def close(self) -> None:
        """Close them, where no worker came of it."""
        self.channel.close()
        os.close(self.stacks)


# -- the supervisor's side (main thread) -----------------------------------------------------------


class ForkServer:
    """The supervisor's hold of its fork server."""

    def __init__(self, app: WakaQ, path: str) -> None:
        self._path = path
        self._process: BaseProcess
        self._socket: socket.socket
        self.is_started = True  # takes requests; one that was spawned imports the application first
        _freeze()
        self._start(multiprocessing.get_context("fork"), app)

    def _start(self, context: Any, app: WakaQ | None) -> None:
        ours, theirs = socket.socketpair()
        start_method = multiprocessing.get_start_method(allow_none=True)
        arguments = (theirs, ours if app else None, app, self._path, start_method)
        process = context.Process(target=serve, args=arguments, name="wakaq-fork-server")
        with theirs, contextlib.ExitStack() as undo:
            undo.callback(ours.close)
            process.start()
            undo.pop_all()
        ours.settimeout(0)
        self._socket, self._process, self._received = ours, process, b""

    def fileno(self) -> int:
        return self._socket.fileno()

    def restart(self) -> None:
        """Start another one in the place of one that was closed; it will tell when it can serve.

        Raises:
            OSError: No process is to be had.
        """
        # What is spawned would import the script that was started as its __main__: it may be gone
        # from the disk.
        script, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
        try:
            self._start(multiprocessing.get_context("spawn"), None)
        finally:
            sys.modules["__main__"] = script

    def fork(self, slot: int, supervisor_id: str) -> Endpoints:
        """Ask for a worker; `receive` will tell its pid.

        Raises:
            OSError: No descriptors are to be had, or the fork server is gone or reads nothing.
        """
        with contextlib.ExitStack() as undo:
            ours, theirs = multiprocessing.Pipe()
            undo.callback(ours.close)
            with theirs, _memory_file() as progress_file, _memory_file() as stacks_file:
                os.ftruncate(progress_file.fileno(), SIZE)
                progress = Progress(progress_file.fileno())
                progress.end()
                descriptors = [theirs.fileno(), progress_file.fileno(), stacks_file.fileno()]
                request = _message((slot, supervisor_id))
                stacks = os.dup(stacks_file.fileno())
                undo.callback(os.close, stacks)
                if socket.send_fds(self._socket, [request], descriptors) < MESSAGE:
                    raise BlockingIOError("the fork server reads nothing")
            undo.pop_all()
        return Endpoints(Channel(ours, is_blocking=False), progress, stacks)

    def receive(self) -> Iterator[Forked | Ended | Started | Broken]:
        """Yield what it has told since.

        Raises:
            EOFError: It is gone.
        """
        while True:
            try:
                data = self._socket.recv(MESSAGE - len(self._received))
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                raise EOFError
            self._received += data
            if len(self._received) < MESSAGE:
                continue
            code, *fields = marshal.loads(self._received)  # noqa: S302 - our own process
            self._received = b""
            told = _KINDS[code](*fields)
            self.is_started = self.is_started or isinstance(told, Started)
            yield told

    @property
    def is_open(self) -> bool:
        """Whether it was not closed."""
        return self._socket.fileno() >= 0

    def close(self, within: float = EXIT_WITHIN) -> None:
        """End it; its workers live on."""
        self._socket.close()
        self.is_started = False
        self._process.join(within)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(EXIT_WITHIN)


def _freeze() -> None:
    """Have the garbage collector leave alone what is loaded.

    Touched pages are copied in each fork.
    """
    gc.collect()
    gc.freeze()


def _memory_file() -> Any:
    """Return an unnamed file, in memory where the system has that."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("wakaq"), "r+b", buffering=0)  # noqa: PTH123 - the caller closes it
    return tempfile.TemporaryFile(buffering=0)


# -- the fork server's side ------------------------------------------------------------------------


def serve(
    supervisor: socket.socket,
    other_end: socket.socket | None,
    app: WakaQ | None,
    path: str,
    start_method: str | None,
) -> None:
    """Fork workers until the supervisor is gone.

    Args:
        supervisor: The way to it.
        other_end: The supervisor's end, which a fork has inherited and must not keep.
        app: The application; None in a spawned process, which imports it from `path`.
        path: As given to `--app`.
        start_method: What the application, if there is one, has set for its own processes.
    """
    if other_end is not None:
        other_end.close()
    set_title("wakaq-worker: fork server")
    # Only the supervisor ends it, by ending itself: no signal for the whole process group or
    # container. Nor do those that are meant for a worker which has just been forked.
    for number in IGNORED:
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if app is None:
        multiprocessing.set_start_method(None, force=True)  # which spawning has set
        try:
            app = load(path)
        # Broad: it is the application's code, which may raise anything.
        except BaseException as error:  # noqa: BLE001
            _tell(supervisor, Broken((str(error) or repr(error))[:MOST_REASON]))
            return
        start_method = multiprocessing.get_start_method(allow_none=True)
        _freeze()
        _tell(supervisor, Started())
    _Server(app, supervisor, start_method).run()


class _Server:
    """The loop of the fork server."""

    def __init__(self, app: WakaQ, supervisor: socket.socket, start_method: str | None) -> None:
        self._app = app
        self._supervisor = supervisor
        self._start_method = start_method
        self._context = multiprocessing.get_context("fork")
        # By what becomes readable when the process has ended: its sentinel would stay open in what
        # its task has forked.
        self._workers: dict[int, BaseProcess] = {}

    def run(self) -> None:
        """Serve until the supervisor is gone."""
        while True:
            for ready in wait([self._supervisor, *self._workers]):
                if isinstance(ready, int):
                    self._reap(ready)
                elif not self._answer():
                    # Not the ordinary exit, which would wait for the workers: they live on.
                    os._exit(0)

    def _answer(self) -> bool:
        """Take a request; returns False if the supervisor is gone."""
        try:
            request, descriptors, _, _ = socket.recv_fds(
                self._supervisor, MESSAGE, DESCRIPTORS, socket.MSG_WAITALL
            )
        except OSError:
            return False
        if not request:
            return False
        slot, supervisor_id = marshal.loads(request)  # noqa: S302 - our own process
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)  # noqa: FBT003 - not to what a task starts
        channel, progress, stacks = descriptors
        try:
            arguments = (slot, supervisor_id, channel, progress, stacks)
            worker = self._context.Process(
                target=self._become_worker, args=arguments, name=f"wakaq-worker-{slot}"
            )
            worker.start()
        except OSError as error:  # no process is to be had: without an answer we are replaced
            logger.error("Worker %d cannot be forked: %s", slot, error)  # noqa: TRY400 - no bug
        else:
            self._workers[_end_of(worker)] = worker
            _tell(self._supervisor, Forked(slot, worker.pid or 0))
        finally:
            # Also those of the channel: a worker sees its supervisor's death only if no sibling has
            # the other end.
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _become_worker(
        self, slot: int, supervisor_id: str, channel: int, progress: int, stacks: int
    ) -> None:
        self._supervisor.close()
        for end, sibling in self._workers.items():
            os.close(end)
            os.close(sibling.sentinel)
        self._workers.clear()
        # Forking has set it; how tasks start processes is the application's choice, or Python's.
        multiprocessing.set_start_method(self._start_method, force=True)
        main(self._app, slot, supervisor_id, Connection(channel), progress, stacks)

    def _reap(self, end: int) -> None:
        worker = self._workers.pop(end)
        os.close(end)
        worker.join()
        _tell(self._supervisor, Ended(worker.pid or 0, worker.exitcode or 0))
        worker.close()


def _message(fields: tuple[Any, ...]) -> bytes:
    return marshal.dumps(fields).ljust(MESSAGE, b"\0")


def _end_of(worker: BaseProcess) -> int:
    """Return a descriptor that becomes readable when the process has ended."""
    if hasattr(os, "pidfd_open"):
        with contextlib.suppress(OSError):
            return os.pidfd_open(worker.pid or 0)
    return os.dup(worker.sentinel)


def _tell(supervisor: socket.socket, message: Forked | Ended | Started | Broken) -> None:
    with contextlib.suppress(OSError):  # it is gone, which the next request shows
        supervisor.sendall(_message((_KINDS.index(type(message)), *message)))
