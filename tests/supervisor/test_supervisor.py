"""What the main thread decides about workers: when to start one, and what to tell of them. No worker is forked here."""

import logging
import selectors
import signal
from types import SimpleNamespace

import pytest

from wakaq.frames import STARTED
from wakaq.service import Outage
from wakaq.supervisor import supervisor as module
from wakaq.supervisor.child import Death
from wakaq.supervisor.memory import Memory
from wakaq.supervisor.supervisor import BOOT_FAILED, LONGEST_DELAY, SHORTEST_LIFE, Supervisor

NOW = 1_000.04


@pytest.fixture
def supervisor(monkeypatch):
    """A main thread with no other threads, whose clock stands still; `forked` are the numbers of the workers it started."""
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: NOW))
    supervisor = object.__new__(Supervisor)
    supervisor.forked, supervisor.posted = [], []

    def spawn(number, worker_id):
        assert worker_id == "me"
        supervisor.forked.append(number)
        return SimpleNamespace(end_fd=supervisor.read_end.fileno())

    def post(call, *args):
        supervisor.posted.append((call, *args))

    with selectors.DefaultSelector() as selector, selectors.DefaultSelector() as read_end:
        supervisor.read_end = read_end
        vars(supervisor).update(
            _children=[],
            _selector=selector,
            _alarms=[],
            _has_booted=True,
            _boot_failures=0,
            _is_draining=False,
            _exit_status=0,
            _bringing=[],
            _memory=None,
            _lease=SimpleNamespace(worker_id="me"),
            _spawner=SimpleNamespace(spawn=spawn),
            _heartbeat=SimpleNamespace(silent=frozenset()),
            _dispatcher=SimpleNamespace(post=post, join_child="join", drain="drain"),
        )
        yield supervisor


def ring(supervisor):
    """Do what is due, whenever it is; returns the seconds until it was."""
    ((at, alarm),) = supervisor._alarms
    supervisor._alarms.clear()
    alarm()
    return pytest.approx(at - NOW)


# -- what is told ----------------------------------------------------------------------------------


def test_the_registry_says_what_each_worker_does(supervisor, make_child, monkeypatch):
    busy, idle = supervisor._children = [make_child(1), make_child(2)]
    busy.run("a", now=NOW - 5.0)
    (slot,) = busy.have("b", is_async=True)
    busy.async_slots[slot], busy.progress.states[slot] = NOW - 2.5, STARTED
    supervisor._heartbeat.silent = frozenset({busy})
    monkeypatch.setattr(module, "rss", {busy: 5_000_000, idle: 7_000_000}.get)

    tasks = [{"name": "a()", "seconds": 5.0}, {"name": "b()", "seconds": 2.5}]
    assert supervisor._describe_children() == [
        {"number": 1, "pid": busy.pid, "rss": 5_000_000, "is_silent": True, "tasks": tasks},
        {"number": 2, "pid": idle.pid, "rss": 7_000_000, "is_silent": False, "tasks": []},
    ]
    # So that the sentence about its end can say it, when it can be measured no more.
    assert (busy.rss, idle.rss) == (5_000_000, 7_000_000)


def bury(supervisor, child, death=None):
    supervisor._children = [child]
    supervisor._selector.register(child.end_fd, selectors.EVENT_READ, child)
    if death:
        child.kill(death)
    supervisor._bury(child)
    assert supervisor._children == []
    assert not supervisor._selector.get_map()


@pytest.mark.parametrize(
    "case",
    [("true", "", logging.INFO), ("false", "", logging.WARNING), ("true", "a()", logging.WARNING)],
)
def test_an_end_is_a_warning_unless_nothing_was_wrong(supervisor, make_child, caplog, case):
    command, victims, level = case
    caplog.set_level(logging.INFO)
    child = make_child(1, command)
    child.process.join(5)
    child.victims = victims
    bury(supervisor, child)

    ((_, found, text),) = caplog.record_tuples
    assert found == level
    assert f"{child} exited with status {int(command == 'false')} after " in text
    assert text.endswith("while it ran a()") == bool(victims)


# -- when a worker is started ----------------------------------------------------------------------


@pytest.mark.parametrize(("lived", "delay"), [(0.1, SHORTEST_LIFE - 0.1), (60.0, 0.0)])
def test_a_worker_that_died_is_replaced_but_not_in_a_hurry(supervisor, child, lived, delay):
    child.spawned_at = NOW - lived
    bury(supervisor, child, Death("it did not answer"))

    assert ring(supervisor) == delay
    assert supervisor.forked == [1]


def test_a_worker_with_a_successor_and_one_at_shutdown_are_not_replaced(supervisor, make_child):
    succeeded, last = make_child(1), make_child(2)
    succeeded.has_successor = True
    bury(supervisor, succeeded, Death("any"))
    supervisor._is_draining = True
    bury(supervisor, last, Death("any"))

    assert supervisor._alarms == []


def test_workers_that_die_while_they_start_are_tried_ever_less_often(
    supervisor, make_child, caplog
):
    delays = []
    for _ in range(7):
        child = make_child()
        child.is_ready = False
        child.boot_failure = "no module named shop"
        bury(supervisor, child, Death("any"))
        ((at, _),) = supervisor._alarms
        supervisor._alarms.clear()
        delays.append(at - NOW)

    assert delays == pytest.approx([1.0, 2.0, 4.0, 8.0, 16.0, LONGEST_DELAY, LONGEST_DELAY])
    assert "cannot start: no module named shop" in caplog.text
    # One that starts ends that.
    healthy = make_child()
    supervisor._children = [healthy]
    supervisor._look_after(healthy)
    failing = make_child()
    failing.is_ready = False
    bury(supervisor, failing, Death("any"))
    assert [at - NOW for at, _ in supervisor._alarms] == pytest.approx([1.0])


def test_where_the_first_workers_cannot_start_the_supervisor_gives_up(supervisor, make_child):
    supervisor._has_booted = False
    failing, other = make_child(1), make_child(2)
    failing.is_ready = other.is_ready = False
    supervisor._children = [failing, other]
    supervisor._selector.register(failing.end_fd, selectors.EVENT_READ, failing)
    failing.kill(Death("any"))
    supervisor._bury(failing)

    assert supervisor._exit_status == BOOT_FAILED
    assert supervisor._is_draining
    assert supervisor.posted == [("drain",)]
    assert other.reap() == -signal.SIGKILL
    assert supervisor._alarms == []


def test_a_worker_that_was_given_its_last_task_gets_one_successor(supervisor, child):
    supervisor._children = [child]
    supervisor._look_after(child)
    assert supervisor._alarms == []
    child.needs_successor = True
    supervisor._look_after(child)
    supervisor._look_after(child)

    assert ring(supervisor) == 0.0
    assert supervisor.forked == [1]


def test_a_worker_that_was_buried_is_not_looked_after_again(supervisor, child):
    child.needs_successor = child.is_gone = True
    supervisor._look_after(child)

    assert supervisor._alarms == []


def test_a_worker_that_cannot_be_forked_is_tried_again(supervisor, caplog):
    supervisor._spawner.spawn = lambda *_: (_ for _ in ()).throw(OSError("no more processes"))
    supervisor._spawn(1)
    ((at, _),) = supervisor._alarms

    assert at == NOW + 1.0
    assert "Worker 1 cannot be forked, trying again: no more processes" in caplog.text


def test_no_worker_is_forked_while_memory_is_above_the_limit(supervisor):
    used = [80.0]
    supervisor._memory = Memory(list, lambda _: None, 80, Outage(), lambda: used[0])
    supervisor._memory.tick(NOW)
    supervisor._in(0.0, supervisor._spawn, 3)
    assert ring(supervisor) == 0.0
    for _ in range(3):
        supervisor._memory.tick(NOW)
        assert ring(supervisor) == 1.0
    assert supervisor.forked == []
    used[0] = 79.9
    supervisor._memory.tick(NOW)
    ring(supervisor)

    assert supervisor.forked == [3]
    ((call, child),) = supervisor.posted
    assert call == "join"
    assert supervisor._children == [child]
    assert supervisor._alarms == []
