"""A worker process by itself, with the test at the supervisor's end of its pipe."""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import tempfile

import pytest

from wakaq.channel import Assign, Channel, Ready
from wakaq.progress import SIZE, Progress

SUPERVISOR_ID = "me"
MAIN = """
import os, sys
from multiprocessing.connection import Connection
from wakaq.worker.main import main

import app
pipe, progress, stacks = map(int, sys.argv[1:])
main(app.wakaq, 1, "me", Connection(pipe), progress, stacks)
"""


class Worker:
    """A worker process. Messages are assigned to it by row; their numbers in Redis are row + 1."""

    def __init__(self, directory, url, stderr):
        ours, theirs = multiprocessing.Pipe()
        with theirs, tempfile.TemporaryFile() as progress, tempfile.TemporaryFile("a") as stacks:
            os.ftruncate(progress.fileno(), SIZE)
            self.progress = Progress(progress.fileno())
            self.progress.end()
            files = [theirs.fileno(), progress.fileno(), stacks.fileno()]
            self.process = subprocess.Popen(
                [sys.executable, "-c", MAIN, *map(str, files)],
                cwd=directory,
                pass_fds=files,
                stderr=stderr,
                env=os.environ | {"PYTHONPATH": str(directory), "REDIS_URL": url},
            )
        self.pid = self.process.pid
        self.channel = Channel(ours, is_blocking=False)
        self._frames = []

    def assign(self, payloads, *, queue=1, is_urgent=False):
        """Assign payloads by row; without a queue they are broadcasts."""
        rows = list(payloads)
        numbers = [0 if queue < 0 else row + 1 for row in rows]
        frame = Assign(SUPERVISOR_ID, queue, rows, numbers, list(payloads.values()), is_urgent)
        self.channel.send(frame)

    def send(self, frame):
        self.channel.send(frame)

    def hear(self, eventually, kind):
        """Return the next frame of a kind; the others stay for later."""

        def has_come():
            self._frames += self.channel.receive()
            return [frame for frame in self._frames if isinstance(frame, kind)] or False

        frame = eventually(has_come, within=10)[0]
        self._frames.remove(frame)
        return frame

    def leave(self):
        """End as a supervisor does that was killed."""
        self.channel.close()

    def discard(self):
        self.leave()
        self.process.kill()
        self.process.wait()
        self.progress = None


@pytest.fixture
def start_worker(load_app, tmp_path, app_url, eventually):
    """`start_worker(source)` returns a `Worker` that has sent its `first` frame, with its `log`."""
    with contextlib.ExitStack() as stack:

        def start(source, url=app_url, expects=Ready):
            load_app(source, url=url)
            log = tmp_path / "worker.log"
            with log.open("wb") as stderr:
                worker = Worker(tmp_path, url, stderr)
            stack.callback(worker.discard)
            worker.log = log
            worker.first = worker.hear(eventually, expects)
            return worker

        yield start
