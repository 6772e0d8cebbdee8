"""Starts worker processes: the one place that does. Not for when to start or replace one: the main thread decides."""

import contextlib
import multiprocessing
import os
import socket
import sys
import tempfile
import types
from multiprocessing import forkserver

from wakaq.frames import Channel, Progress
from wakaq.loader import APP_VARIABLE
from wakaq.supervisor.child import Child
from wakaq.worker.worker import InheritedFile, main


class Spawner:
    """Forks workers from a fork server, which has imported the application and has no threads (main thread only)."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["wakaq.worker.forkserver_preload"])
        os.environ[APP_VARIABLE] = path
        # Each worker would import the script that was started, and with it the command line's packages, as its __main__.
        sys.modules["__main__"] = types.ModuleType("__main__")

    def tend(self) -> None:
        """Reap a fork server that has died, and start another, so that the next worker need not wait for it."""
        with contextlib.suppress(OSError):  # no more processes to be had: spawning will say so
            forkserver.ensure_running()

    def spawn(self, number: int, worker_id: str) -> Child:
        """Start a worker; raises OSError or EOFError where nothing more can be had, or the fork server has just died."""
        ours, theirs = socket.socketpair()
        ours.settimeout(0)
        progress = Progress()
        # Closing our copy of `theirs` lets the worker's death be the end of the stream.
        with theirs, tempfile.TemporaryFile() as stacks:
            file = InheritedFile(stacks.fileno())
            told = (self._path, number, worker_id, theirs, progress.memory, file)
            name = f"wakaq-worker-{number}"
            process = self._context.Process(target=main, args=told, name=name)
            with contextlib.ExitStack() as undo:
                undo.callback(ours.close)
                process.start()
                undo.callback(process.kill)
                copy = os.dup(stacks.fileno())
                undo.callback(os.close, copy)
                child = Child(number, process, Channel(ours), progress, copy)
                undo.pop_all()
            return child
