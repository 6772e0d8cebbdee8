"""The process from which workers are forked: really forked, killed, stopped and replaced."""

import contextlib
import gc
import multiprocessing
import multiprocessing.util
import os
import select
import signal
import sys
import time
import types
from pathlib import Path

import psutil
import pytest

from wakaq.channel import Ready, Stop
from wakaq.supervisor.fork_server import Broken, Ended, Forked, ForkServer, Started

SHOP = """
import multiprocessing, os
from pathlib import Path
from wakaq import WakaQ

with Path("imports").open("a") as file:
    file.write(f"{os.getpid()}\\n")
multiprocessing.set_start_method("spawn")  # which may be done once
wakaq = WakaQ(queues=["default"])

@wakaq.after_worker_started
def note():
    Path(f"worker-{os.getpid()}").write_text(multiprocessing.get_start_method(allow_none=True))
"""


def next_told(server, within=10.0):
    """Return what the fork server tells next."""
    deadline = time.monotonic() + within
    while True:
        for told in server.receive():
            return told
        poll = select.poll()
        poll.register(server, select.POLLIN)
        assert poll.poll(1_000 * max(0.0, deadline - time.monotonic())), "nothing was told"


def next_frame(endpoints, within=10.0):
    """Return what a worker says next."""
    deadline = time.monotonic() + within
    while True:
        for frame in endpoints.channel.receive():
            return frame
        poll = select.poll()
        poll.register(endpoints.channel, select.POLLIN)
        assert poll.poll(1_000 * max(0.0, deadline - time.monotonic())), "nothing was said"


def wait_for_end(pid, within=5.0):
    """Wait until a process has ended; nobody may have reaped it yet."""
    deadline = time.monotonic() + within
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, f"{pid} goes on"
            time.sleep(0.01)


class Nursery:
    """A fork server, and all that was forked by it."""

    def __init__(self, app, path):
        self.server = ForkServer(app, path)
        self.endpoints = []
        self.pids = []

    def fork(self, slot=1):
        """Return the pid of a new worker that is ready, and what is shared with it."""
        endpoints = self.server.fork(slot, "me")
        self.endpoints.append(endpoints)
        told = next_told(self.server)
        assert isinstance(told, Forked)
        assert told.slot == slot
        self.pids.append(told.pid)
        assert next_frame(endpoints) == Ready()
        return told.pid, endpoints

    @property
    def process(self):
        return psutil.Process(self.server._process.pid)

    def kill(self):
        """Kill the fork server, and give it up."""
        self.process.kill()
        with pytest.raises(EOFError):
            next_told(self.server)
        self.server.close()

    def close(self, close_memory):
        for endpoints in self.endpoints:
            endpoints.close()
            close_memory(endpoints.progress)
        self.server.close()
        self.server._process.close()
        for pid in self.pids:
            wait_for_end(pid)


@pytest.fixture
def make_nursery(end_resource_tracker, close_memory):
    with contextlib.ExitStack() as stack:
        stack.callback(gc.unfreeze)
        stack.callback(end_resource_tracker)

        def make(app, path="shop.wakaq"):
            nursery = Nursery(app, path)
            stack.callback(nursery.close, close_memory)
            return nursery

        yield make


@pytest.fixture
def nursery(app, make_nursery):
    return make_nursery(app)


@pytest.fixture
def shop(load_app, monkeypatch, tmp_path, make_nursery):
    """A nursery whose application is in a module of the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    multiprocessing.set_start_method(None, force=True)
    yield make_nursery(load_app(SHOP, name="shop").wakaq)
    multiprocessing.set_start_method(None, force=True)


def imports():
    return len(Path("imports").read_text().split())


def title(process):
    return " ".join(process.cmdline()).strip()


# -- forking ---------------------------------------------------------------------------------------


def test_a_worker_is_forked_and_serves(nursery):
    pid, endpoints = nursery.fork(slot=3)

    assert psutil.Process(pid).ppid() == nursery.process.pid
    assert title(psutil.Process(pid)).startswith("wakaq-worker: worker 3 ")
    assert title(nursery.process) == "wakaq-worker: fork server"
    assert 0.0 < endpoints.progress.pong_at <= time.monotonic()
    assert endpoints.progress.row == -1


def test_the_stacks_of_a_worker_can_be_read_here(nursery):
    pid, endpoints = nursery.fork()
    os.kill(pid, signal.SIGUSR1)

    deadline = time.monotonic() + 5
    while b"worker/main.py" not in os.pread(endpoints.stacks, 64_000, 0):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("how", ["told", "killed"])
def test_how_a_worker_has_ended_is_told(nursery, how):
    pid, endpoints = nursery.fork()
    if how == "told":
        endpoints.channel.send(Stop())
    else:
        os.kill(pid, signal.SIGKILL)

    assert next_told(nursery.server) == Ended(pid, 0 if how == "told" else -signal.SIGKILL)


def test_several_workers_are_forked_at_once_and_told_apart(nursery):
    for slot in (1, 2, 3):
        nursery.endpoints.append(nursery.server.fork(slot, "me"))
    told = [next_told(nursery.server) for _ in range(3)]
    nursery.pids += [forked.pid for forked in told]

    assert [forked.slot for forked in told] == [1, 2, 3]
    assert len(set(nursery.pids)) == 3
    os.kill(told[1].pid, signal.SIGKILL)
    assert next_told(nursery.server) == Ended(told[1].pid, -signal.SIGKILL)


def test_nothing_is_told_before_something_happens(nursery):
    assert list(nursery.server.receive()) == []


# -- what workers inherit --------------------------------------------------------------------------


def sockets(pid):
    """Return the sockets that a process has open."""
    found = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(path.readlink())
            if target.startswith("socket:"):
                found.add(target)
    return found


def test_no_worker_has_a_descriptor_of_another_or_of_the_supervisor(nursery):
    first, _ = nursery.fork(1)
    second, _ = nursery.fork(2)
    # What pytest itself has open is inherited by all.
    here = sockets(os.getpid()) - {f"socket:[{nursery_socket(nursery)}]"}
    ours = {one for one in here if one in sockets(nursery.process.pid)}

    assert (sockets(first) - ours) & (sockets(second) - ours) == set()
    assert len(sockets(first) - ours) == len(sockets(second) - ours) == 1
    assert sockets(nursery.process.pid) & (sockets(first) | sockets(second)) <= ours


def nursery_socket(nursery):
    return os.fstat(nursery.server.fileno()).st_ino


def test_the_end_of_a_worker_is_seen_although_its_siblings_and_the_fork_server_live(nursery):
    first, endpoints = nursery.fork(1)
    nursery.fork(2)
    os.kill(first, signal.SIGKILL)

    with pytest.raises(EOFError):
        next_frame(endpoints)


def test_a_worker_sees_the_end_of_its_supervisor_although_its_siblings_live(nursery):
    first, endpoints = nursery.fork(1)
    nursery.fork(2)
    nursery.endpoints.remove(endpoints)
    endpoints.close()

    assert next_told(nursery.server) == Ended(first, 0)


def test_a_worker_leads_its_own_group_and_a_signal_for_the_fork_server_reaches_nobody(nursery):
    pid, _ = nursery.fork()
    assert os.getpgid(pid) == pid
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        nursery.process.send_signal(number)

    assert nursery.fork(2)
    assert psutil.pid_exists(pid)


def test_the_application_is_imported_once_for_all_workers(shop):
    for slot in (1, 2):
        shop.fork(slot)

    assert imports() == 1


@pytest.mark.parametrize("method", [None, "spawn"])
def test_tasks_start_processes_as_the_application_or_python_would_have_it(
    app, make_nursery, tmp_path, method
):
    @app.after_worker_started
    def note():
        found = multiprocessing.get_start_method(allow_none=True)
        (tmp_path / "method").write_text(str(found))

    multiprocessing.set_start_method(method, force=True)
    try:
        make_nursery(app).fork()
    finally:
        multiprocessing.set_start_method(None, force=True)

    assert (tmp_path / "method").read_text() == str(method)


# -- another fork server ---------------------------------------------------------------------------


def test_workers_outlive_the_fork_server_and_another_forks_the_next(shop):
    first, endpoints = shop.fork(1)
    shop.kill()
    assert not shop.server.is_started
    assert not shop.server.is_open
    shop.server.restart()
    assert next_told(shop.server) == Started()
    assert shop.server.is_started
    second, _ = shop.fork(2)

    assert imports() == 2
    # That the second one was spawned is not seen by the application, which has chosen for itself.
    assert Path(f"worker-{second}").read_text() == "spawn"
    assert psutil.pid_exists(first)
    endpoints.channel.send(Stop())
    wait_for_end(first)


def test_a_fork_server_is_started_anew_where_the_script_is_gone(shop, monkeypatch):
    """What is spawned otherwise imports the script that was started as its __main__."""
    script = types.ModuleType("__main__")
    script.__file__ = "/nowhere/script.py"
    monkeypatch.setitem(sys.modules, "__main__", script)
    shop.kill()
    shop.server.restart()

    assert next_told(shop.server) == Started()
    assert sys.modules["__main__"] is script


def test_nothing_of_this_process_is_inherited_by_a_fork_server_that_is_started_anew(shop):
    _, endpoints = shop.fork()
    shop.kill()
    shop.server.restart()
    assert next_told(shop.server) == Started()

    theirs = sockets(shop.process.pid)
    assert len(theirs) == 1
    assert theirs & sockets(os.getpid()) == set()
    assert f"socket:[{os.fstat(endpoints.channel.fileno()).st_ino}]" not in theirs


def test_a_fork_server_that_cannot_import_the_application_says_so_and_ends(shop):
    shop.kill()
    Path("shop.py").write_text("raise RuntimeError('no such shop ' + 'é' * 10_000)")
    shop.server.restart()
    told = next_told(shop.server)

    assert isinstance(told, Broken)
    assert "RuntimeError: no such shop é" in told.reason
    with pytest.raises(EOFError):
        next_told(shop.server)


def test_where_no_process_is_to_be_had_another_try_is_possible(shop, monkeypatch):
    shop.kill()

    def refuse(*_):
        raise BlockingIOError("no more processes")

    with monkeypatch.context() as patch:
        patch.setattr(multiprocessing.util, "spawnv_passfds", refuse)
        with pytest.raises(BlockingIOError):
            shop.server.restart()
        assert not shop.server.is_open
        shop.server.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            shop.server.fork(1, "me")
    shop.server.restart()

    assert next_told(shop.server) == Started()


def test_a_fork_server_that_is_stopped_is_ended_at_once(nursery):
    process = nursery.process
    process.suspend()
    # It is not noticed by asking.
    nursery.endpoints.append(nursery.server.fork(1, "me"))
    nursery.server.close(within=0.0)

    assert not process.is_running()


def test_a_fork_server_that_reads_nothing_refuses_more_in_the_end(nursery):
    nursery.process.suspend()
    with pytest.raises(OSError, match=r"unavailable|reads nothing"):  # noqa: PT012 - one of many
        for slot in range(10_000):
            nursery.endpoints.append(nursery.server.fork(slot, "me"))

    nursery.server.close(within=0.0)


def test_a_fork_server_ends_at_once_when_it_is_closed_and_its_workers_live_on(nursery):
    pid, _ = nursery.fork()
    process = nursery.process
    nursery.server.close()

    assert not process.is_running()
    assert nursery.server._process.exitcode == 0
    assert psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
