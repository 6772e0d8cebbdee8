"""A peer at work.

Its environment, a server of its own, its workers, and its producer as a subprocess.

`PEERS` is the list of everybody who takes part. What is measured is not here.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE
from typing import Any, Self

from benchmarks.machine import Marks, Server, send_signal, tree

HERE = Path(__file__).parent
ENVIRONMENTS = Path(os.environ.get("BENCH_HOME", Path.home() / ".cache" / "wakaq-benchmarks"))
SHARED_MEMORY = Path("/dev/shm")  # the marks are to cost no disk writes


@dataclass(frozen=True)
class Peer:
    """One queue, in one way to run it."""

    name: str
    module: str
    environment: str
    # How many tasks to drain in a round: two to five seconds of work.
    tasks: int
    variant: str = ""
    has_delay: bool = True
    has_bulk: bool = False

    @property
    def python(self) -> Path:
        """The interpreter of its environment."""
        return ENVIRONMENTS / self.environment / "bin" / "python"

    @property
    def is_rival(self) -> bool:
        """Whether it is a queue, and not ours."""
        return self.module not in ("wakaq", "floor")

    def install(self) -> None:
        """Make its environment, or make it again if its requirements changed."""
        wanted = HERE / "requirements" / f"{self.environment}.txt"
        home = ENVIRONMENTS / self.environment
        installed = home / "requirements.txt"
        if installed.exists() and installed.read_text() == wanted.read_text():
            return
        print(f"installing {self.environment}", file=sys.stderr)
        shutil.rmtree(home, ignore_errors=True)
        venv.create(home, with_pip=True)
        pip = [str(self.python), "-m", "pip", "install", "--quiet", "-r", str(wanted)]
        subprocess.run(pip, check=True, cwd=HERE.parent)
        shutil.copy(wanted, installed)


PEERS = {
    peer.name: peer
    for peer in (
        Peer("wakaq", "wakaq", "wakaq", 300_000, has_bulk=True),
        Peer("celery", "celery", "celery", 2_500),
        Peer("rq", "rq", "rq", 300),
        Peer("rq (simple)", "rq", "rq", 1_000, "simple"),
        Peer("dramatiq", "dramatiq", "dramatiq", 12_000),
        Peer("huey", "huey", "huey", 12_000),
        Peer("huey (threads)", "huey", "huey", 12_000, "thread"),
        Peer("arq", "arq", "arq", 1_500),
        Peer("saq", "saq", "saq", 8_000),
        Peer("streaq", "streaq", "streaq", 5_000),
        Peer("taskiq (list)", "taskiq", "taskiq", 12_000),
        Peer("taskiq (stream)", "taskiq", "taskiq", 12_000, "stream"),
        Peer("PyPI wakaq 2.1.25", "wakaq_pypi", "wakaq2", 40_000),
        Peer("PyPI wakaq 3.0.7", "wakaq_pypi", "wakaq3", 40_000),
        Peer("floor: BLPOP", "floor", "floor", 30_000, "blpop", has_delay=False, has_bulk=True),
        Peer(
            "floor: LPOP 100", "floor", "floor", 600_000, "lpop100", has_delay=False, has_bulk=True
        ),
    )
}


@dataclass
class Session:
    """A peer with a server and a marks file of its own.

    A context manager that leaves nothing running.
    """

    peer: Peer
    capacity: int
    processes: int = 2
    slots: int = 0
    queues: int = 1
    # The port that producer and workers are told; another than the server's puts a proxy in
    # between.
    port: int = 0
    server_options: tuple[str, ...] = ()
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __enter__(self) -> Self:
        self.peer.install()
        with contextlib.ExitStack() as stack:
            base = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
            self.folder = Path(tempfile.mkdtemp(prefix="bench-", dir=base))
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self.server = Server(self.folder, *self.server_options)
            stack.callback(self.server.stop)
            self.marks = Marks(self.folder / "marks", self.capacity)
            self.description = json.loads(self.call("describe"))
            stack.callback(self.stop_workers)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def environment(self) -> dict[str, str]:
        """Return the environment of everything that runs for this peer."""
        home = self.peer.python.parent
        return {
            **os.environ,
            "PATH": f"{home}:{os.environ['PATH']}",
            "VIRTUAL_ENV": str(home.parent),
            "PYTHONPATH": str(HERE),
            "BENCH_PORT": str(self.port or self.server.port),
            "BENCH_VARIANT": self.peer.variant,
            "BENCH_PROCESSES": str(self.processes),
            "BENCH_SLOTS": str(self.slots or ""),
            "BENCH_QUEUES": str(self.queues),
            "BENCH_MARKS": str(self.marks.path),
        }

    def _popen(
        self, command: list[str], environment: dict[str, str], **options: Any
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment() | environment, **options
        )

    def producer(self, action: str, spec: dict[str, Any] | None = None) -> subprocess.Popen[bytes]:
        """Start the peer's own command line."""
        command = [str(self.peer.python), "-m", "peers", self.peer.module, action]
        return self._popen([*command, json.dumps(spec)], {}, stdout=PIPE, stderr=PIPE)

    def call(self, action: str, spec: dict[str, Any] | None = None) -> bytes:
        """Run the peer's own command line; return what it printed."""
        output, errors = (process := self.producer(action, spec)).communicate()
        if process.returncode:
            raise RuntimeError(f"{self.peer.name}: {action} {spec} failed: {errors.decode()}")
        return output

    def enqueue(self, tasks: int, **spec: Any) -> dict[str, Any]:
        """Enqueue in a producer process; return what it measured."""
        answer: dict[str, Any] = json.loads(self.call("enqueue", {"tasks": tasks, **spec}))
        return answer

    def spawn(self, *, delayed: bool = False, **environment: str) -> None:
        """Start the workers."""
        schedulers = self.description["schedulers"] if delayed else []
        with (self.folder / "log").open("ab") as log:
            self.workers += [
                self._popen(command, environment, stdout=log, stderr=log, start_new_session=True)
                for command in self.description["workers"] + schedulers
            ]

    def start_workers(self, *, delayed: bool = False) -> None:
        """Start the workers and wait until they ran one task (the last of the capacity)."""
        self.spawn(delayed=delayed)
        self.enqueue(1, first=self.capacity - 1)
        try:
            self.marks.wait(self.capacity, 30, self.capacity - 1)
        except TimeoutError as error:
            error.add_note((self.folder / "log").read_text()[-3000:])
            raise
        # The other processes need as long again, and first ticks and imports are to be over.
        time.sleep(1.5)

    def pids(self) -> list[int]:
        """Return all processes that work."""
        return tree([worker.pid for worker in self.workers])

    def stop_workers(self) -> None:
        """Ask the workers to end; after a while make them."""
        pids = self.pids()
        for worker in self.workers:
            worker.terminate()
        for worker in self.workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(5)
        send_signal([*pids, *self.pids()], signal.SIGKILL)
        for worker in self.workers:
            worker.wait()
        self.workers = []

    def pause(self) -> None:
        """Stop the workers in their tracks, so that work can pile up before the clock starts."""
        send_signal(self.pids(), signal.SIGSTOP)

    def resume(self) -> float:
        """Let the workers go on; return the moment."""
        send_signal(self.pids()[::-1], signal.SIGCONT)
        return time.monotonic()

    @contextlib.contextmanager
    def pinned(self) -> Iterator[None]:
        """Give the server one core, and this process and the producers it starts another."""
        cores = os.sched_getaffinity(0)
        pid = self.server.process.pid
        os.sched_setaffinity(pid, {min(cores)})
        os.sched_setaffinity(0, {max(cores)})
        try:
            yield
        finally:
            os.sched_setaffinity(pid, cores)
            os.sched_setaffinity(0, cores)
