"""What the main thread decides about workers: its own steps, with a fork server that really forks.

No other thread runs, and its clock stands still unless the test moves it.
"""

import gc
import logging
import multiprocessing
import multiprocessing.util
import os
import select
import selectors
import signal
from pathlib import Path

import pytest

from wakaq.progress import STARTED
from wakaq.service import Outage
from wakaq.supervisor import supervisor as module
from wakaq.supervisor.child import Death, State
from wakaq.supervisor.memory import Memory
from wakaq.supervisor.supervisor import (
    BOOT_FAILED,
    EXIT_GRACE,
    FORK_WITHIN,
    IMPORT_WITHIN,
    LONGEST_DELAY,
    MOST_FORK_SERVERS,
    MOST_FORKING,
    SHORTEST_LIFE,
    STACKS_AFTER,
    START_WITHIN,
    STATUS_GRACE,
    Supervisor,
)


@pytest.fixture
def make_supervisor(make_app, clock, monkeypatch, end_resource_tracker, close_memory):
    """`make_supervisor(**options)` returns a supervisor's main thread, which was not started."""
    made = []
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "set_title", lambda _: None)  # it is pytest's

    def make(**options):
        made.append(Supervisor(make_app(**options), "shop.wakaq"))
        return made[-1]

    yield make
    for supervisor in made:
        close(supervisor, close_memory)
    end_resource_tracker()
    gc.unfreeze()


def close(supervisor, close_memory):
    forking = [endpoints.progress for endpoints, _ in supervisor._forking.values()]
    supervisor._give_up_forking()
    for child in supervisor._children:
        if not child._is_reaped:
            child.kill(Death("the test has ended"))
            child.reap()
    for progress in (*forking, *(child.progress for child in supervisor._children)):
        close_memory(progress)
    supervisor.close()
    supervisor._fork_server._process.close()
    supervisor._dispatcher._selector.close()
    for mailbox in (supervisor._mailbox, supervisor._dispatcher._mailbox):
        os.close(mailbox._reader)
        os.close(mailbox._writer)


@pytest.fixture
def supervisor(make_supervisor):
    return make_supervisor()


def alarms(supervisor):
    """Return what is to be done later: the seconds until then, and the function's name."""
    now = module.time.monotonic()
    return [(pytest.approx(at - now), call.func.__name__) for at, call in supervisor._alarms]


def do_next(supervisor):
    """Do what is to be done later, whenever that is; returns the seconds until then."""
    ((at, call),) = supervisor._alarms
    supervisor._alarms.clear()
    call()
    return pytest.approx(at - module.time.monotonic())


def posted(supervisor):
    """Return what was posted to the dispatcher."""
    calls, found = supervisor._dispatcher._mailbox._calls, []
    while not calls.empty():
        call, args = calls.get()
        found.append((call.__name__, *args))
    return found


def hear(supervisor):
    """Hear what the fork server tells next."""
    assert select.select([supervisor._fork_server], [], [], 10)[0], "nothing was told"
    supervisor._hear_fork_server()


def take_in(supervisor, *children):
    """Have these be the supervisor's workers."""
    supervisor._children = list(children)
    for child in children:
        supervisor._selector.register(child.end_fd, selectors.EVENT_READ, child)


def end(supervisor, child, status=0):
    """Have a worker be gone, and the fork server have told how."""
    take_in(supervisor, child)
    supervisor._statuses[child.pid] = status
    child.state = State.GONE
    supervisor._look_after(child)
    assert supervisor._children == []


# -- what is told ----------------------------------------------------------------------------------


def test_the_registry_says_what_each_worker_does(supervisor, make_child, clock, monkeypatch):
    busy, idle = supervisor._children = [make_child(1), make_child(2)]
    busy.run("a", now=clock.now - 5.04)
    (row,) = busy.have("b", is_async=True)
    busy.async_rows[row], busy.progress.states[row] = clock.now - 2.5, STARTED
    supervisor._heartbeat.silent = frozenset({busy})
    monkeypatch.setattr(module, "rss", {busy: 5_000_000, idle: 7_000_000}.get)

    tasks = [{"name": "a()", "seconds": 5.0}, {"name": "b()", "seconds": 2.5}]
    assert supervisor._describe_children() == [
        {"number": 1, "pid": busy.pid, "rss": 5_000_000, "is_silent": True, "tasks": tasks},
        {"number": 2, "pid": idle.pid, "rss": 7_000_000, "is_silent": False, "tasks": []},
    ]
    # So that the sentence about its end can say it, when it can be measured no more.
    assert (busy.rss, idle.rss) == (5_000_000, 7_000_000)


@pytest.mark.parametrize(
    "case",
    [
        (0, "", logging.INFO),
        (1, "", logging.WARNING),
        (-9, "", logging.WARNING),
        (0, "a()", logging.WARNING),
    ],
)
def test_an_end_is_a_warning_unless_nothing_was_wrong(supervisor, child, caplog, case):
    status, was_running, level = case
    caplog.set_level(logging.INFO)
    child.was_running = was_running
    end(supervisor, child, status)

    ((_, found, text),) = caplog.record_tuples
    assert found == level
    assert text.startswith(f"{child} {'was killed by' if status < 0 else 'exited with'} ")
    assert text.endswith("while it ran a()") == bool(was_running)


def test_the_end_of_a_worker_is_told_once_its_status_is_known(supervisor, child, caplog):
    take_in(supervisor, child)
    child.state = State.GONE
    supervisor._look_after(child)
    assert do_next(supervisor) == 0.02
    assert caplog.messages == []
    # Until then it is no worker any more, but the shutdown waits for it.
    assert (supervisor._children, supervisor._reaping) == ([], {child})
    supervisor._statuses[child.pid] = -signal.SIGSEGV
    do_next(supervisor)

    assert f"{child} was killed by SIGSEGV" in caplog.text
    assert supervisor._reaping == set()
    assert [name for _, name in alarms(supervisor)] == ["_spawn"]


def test_the_end_of_a_worker_is_told_also_where_nobody_tells_its_status(
    supervisor, child, caplog, clock
):
    caplog.set_level(logging.INFO)
    take_in(supervisor, child)
    child.state = State.GONE
    supervisor._look_after(child)
    clock.now += STATUS_GRACE
    do_next(supervisor)

    assert f"{child} ended, nobody knows how" in caplog.text
    assert [name for _, name in alarms(supervisor)] == ["_spawn"]


# -- the end of workers ----------------------------------------------------------------------------


def test_the_dispatcher_is_told_when_a_worker_has_ended(supervisor, child):
    take_in(supervisor, child)
    supervisor._after(60.0, print)
    child.end()
    supervisor._step()

    assert posted(supervisor) == [("end_child", child)]
    assert child.end_fd not in supervisor._selector.get_map()


def test_a_worker_that_is_gone_is_reaped_once(supervisor, child, caplog):
    """The dispatcher tells of it when it is ready, and when it is gone, perhaps at once."""
    end(supervisor, child, status=1)
    supervisor._look_after(child)

    assert [name for _, name in alarms(supervisor)] == ["_spawn"]
    assert supervisor._reaping == set()
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(("lived", "delay"), [(0.1, SHORTEST_LIFE - 0.1), (60.0, 0.0)])
def test_a_worker_that_died_is_replaced_but_not_in_a_hurry(supervisor, child, clock, lived, delay):
    child.spawned_at = clock.now - lived
    end(supervisor, child)

    assert alarms(supervisor) == [(delay, "_spawn")]


def test_a_worker_that_ends_at_shutdown_is_not_replaced(supervisor, child):
    supervisor._is_draining = True
    end(supervisor, child)

    assert supervisor._alarms == []


def test_workers_that_die_while_they_start_are_tried_ever_less_often(
    supervisor, make_child, caplog
):
    supervisor._has_booted, delays = True, []
    for _ in range(7):
        child = make_child()
        child.has_served, child.boot_failure = False, "no module named shop"
        end(supervisor, child, BOOT_FAILED)
        ((delay, name),) = alarms(supervisor)
        assert name == "_spawn"
        supervisor._alarms.clear()
        delays.append(delay)

    assert delays == [1.0, 2.0, 4.0, 8.0, 16.0, LONGEST_DELAY, LONGEST_DELAY]
    assert "cannot start: no module named shop" in caplog.text
    # One that starts ends that.
    supervisor._look_after(make_child())
    failing = make_child()
    failing.has_served = False
    end(supervisor, failing)
    assert alarms(supervisor) == [(1.0, "_spawn")]


def test_where_the_first_workers_cannot_start_the_supervisor_gives_up(supervisor, make_child):
    failing, other = make_child(1), make_child(2)
    failing.has_served = other.has_served = False
    take_in(supervisor, failing, other)
    supervisor._statuses[failing.pid] = BOOT_FAILED
    failing.state = State.GONE
    supervisor._look_after(failing)

    assert supervisor._exit_status == BOOT_FAILED
    assert supervisor._is_draining
    assert posted(supervisor) == [("drain",)]
    assert other.process.wait(5) == -signal.SIGKILL
    assert supervisor._alarms == []


def test_a_worker_that_served_before_it_died_is_no_failed_start(supervisor, child):
    """Also where the word of its start came together with that of its end."""
    end(supervisor, child, status=1)

    assert not supervisor._is_draining
    assert supervisor._has_booted


def test_a_worker_that_does_not_exit_is_killed(supervisor, child, clock):
    take_in(supervisor, child)
    child.stopped_at = clock.now - EXIT_GRACE
    supervisor._tend()
    assert child.death is None
    clock.now += 0.1
    supervisor._tend()

    assert child.death == Death("it did not exit")
    assert child.process.wait(5) == -signal.SIGKILL


def test_a_worker_that_does_not_get_ready_is_killed(supervisor, child, clock):
    take_in(supervisor, child)
    child.state, child.spawned_at = State.STARTING, clock.now - START_WITHIN
    supervisor._tend()
    assert child.death is None
    clock.now += 0.1
    supervisor._tend()

    assert child.death == Death("it did not start within 60 s")
    assert child.process.wait(5) == -signal.SIGKILL


def test_where_nothing_else_tells_the_fork_server_tells_of_a_workers_end(supervisor):
    supervisor._spawn(1)
    hear(supervisor)
    (child,) = supervisor._children
    supervisor._selector.unregister(child.end_fd)
    os.close(child.end_fd)
    child.end_fd = None  # as where the system has no such thing
    posted(supervisor)
    child.kill(Death("any"))
    hear(supervisor)

    assert posted(supervisor) == [("end_child", child)]
    assert supervisor._statuses == {child.pid: -signal.SIGKILL}


# -- starting workers ------------------------------------------------------------------------------


def test_a_worker_is_forked_and_handed_to_the_dispatcher(supervisor):
    supervisor._spawn(3)
    assert list(supervisor._forking) == [3]
    hear(supervisor)

    (child,) = supervisor._children
    assert (child.slot, child.state) == (3, State.STARTING)
    assert posted(supervisor) == [("join_child", child)]
    assert supervisor._forking == {}
    assert supervisor._selector.get_key(child.end_fd).data is child
    assert supervisor._alarms == []


def test_how_a_worker_has_ended_is_learned_from_the_fork_server(supervisor):
    supervisor._spawn(1)
    hear(supervisor)
    (child,) = supervisor._children
    os.kill(child.pid, signal.SIGKILL)
    hear(supervisor)

    assert supervisor._statuses == {child.pid: -signal.SIGKILL}


def test_a_worker_that_was_given_up_meanwhile_is_not_taken_in(supervisor):
    supervisor._spawn(1)
    supervisor._drain()
    posted(supervisor)
    hear(supervisor)
    # It sees that by the end of its channel.
    hear(supervisor)

    assert supervisor._children == []
    assert posted(supervisor) == []
    # Nor is kept how it has ended, as its pid may be another's later.
    assert supervisor._statuses == {}


def test_a_worker_that_cannot_be_forked_is_tried_again(supervisor, caplog):
    supervisor._selector.unregister(supervisor._fork_server)
    supervisor._fork_server._socket.close()
    supervisor._spawn(1)

    assert alarms(supervisor) == [(1.0, "_spawn")]
    assert "Worker 1 cannot be forked, trying again: " in caplog.text
    assert supervisor._forking == {}
    caplog.clear()  # it has the error, and so all that was open


def test_no_more_than_some_are_forked_at_once(supervisor):
    slots = list(range(1, MOST_FORKING + 3))
    for slot in slots:
        supervisor._spawn(slot)
    assert list(supervisor._forking) == slots[:-2]
    assert list(supervisor._wanted) == slots[-2:]
    while supervisor._wanted:
        hear(supervisor)

    asked = {*supervisor._forking, *(child.slot for child in supervisor._children)}
    assert asked == set(slots)


def test_no_worker_is_forked_while_memory_is_above_the_limit(supervisor, child, clock, caplog):
    used = [80.0]
    supervisor._memory = Memory(list, lambda _: None, 80, Outage(), lambda: used[0])
    supervisor._memory.tick(clock.now)
    take_in(supervisor, child)
    supervisor._spawn(3)
    assert caplog.messages == []
    supervisor._children = []
    for _ in range(3):
        supervisor._memory.tick(clock.now)
        supervisor._tend()
    assert supervisor._forking == {}
    assert caplog.messages == ["Memory is short, and no worker is left: none is started meanwhile"]
    used[0] = 79.9
    supervisor._memory.tick(clock.now)
    supervisor._tend()

    assert list(supervisor._forking) == [3]


def test_no_worker_is_forked_at_shutdown(supervisor):
    supervisor._drain()
    supervisor._spawn(1)

    assert supervisor._forking == {}
    assert supervisor._alarms == []


# -- another fork server ---------------------------------------------------------------------------


@pytest.fixture
def shop(make_supervisor, monkeypatch, tmp_path):
    """A supervisor whose application can be imported again."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shop.py").write_text("from wakaq import WakaQ\nwakaq = WakaQ(queues=['low'])\n")
    return make_supervisor()


@pytest.fixture
def stuck(shop):
    """The same, where the fork server is stopped and has been asked for a worker."""
    os.kill(shop._fork_server._process.pid, signal.SIGSTOP)
    shop._spawn(1)
    return shop


def wait_for_worker(supervisor):
    """Have the worker be forked that is waited for, once the fork server has started."""
    # It has to import the application first.
    assert (supervisor._forking, list(supervisor._wanted)) == ({}, [1])
    hear(supervisor)
    assert list(supervisor._forking) == [1]
    hear(supervisor)
    return [child.slot for child in supervisor._children]


def test_a_fork_server_that_is_killed_is_replaced_and_asked_again(stuck, caplog):
    os.kill(stuck._fork_server._process.pid, signal.SIGKILL)
    hear(stuck)

    assert "The fork server is gone: starting another" in caplog.text
    assert wait_for_worker(stuck) == [1]


def test_a_fork_server_that_does_not_answer_is_replaced_and_asked_again(stuck, clock, caplog):
    process = stuck._fork_server._process
    clock.now += FORK_WITHIN
    stuck._tend()
    assert process.is_alive()
    clock.now += 0.1
    stuck._tend()

    assert not process.is_alive()
    assert "The fork server does not answer: starting another" in caplog.text
    assert wait_for_worker(stuck) == [1]


def test_a_fork_server_that_is_asked_for_nothing_need_not_answer(shop, clock):
    shop._tend()
    clock.now += 1_000.0
    shop._tend()

    assert shop._fork_server._process.is_alive()


def test_a_fork_server_that_does_not_get_ready_is_replaced(stuck, clock):
    stuck._replace_fork_server("is no good")
    process = stuck._fork_server._process
    clock.now += IMPORT_WITHIN
    stuck._tend()
    assert process.is_alive()
    clock.now += 0.1
    stuck._alarms.clear()
    stuck._tend()

    assert not process.is_alive()
    assert stuck._failed_fork_servers == 1
    assert [name for _, name in alarms(stuck)] == ["_tend", "_start_fork_server"]
    # That one need not be waited for, and is not there.
    clock.now += 2 * IMPORT_WITHIN
    stuck._tend()
    assert stuck._failed_fork_servers == 1


def test_an_application_that_cannot_be_imported_any_more_ends_the_supervisor(shop, caplog):
    Path("shop.py").write_text("raise RuntimeError('no such shop')")
    os.kill(shop._fork_server._process.pid, signal.SIGKILL)
    while not shop._is_draining:
        (do_next if shop._alarms else hear)(shop)

    assert shop._exit_status == BOOT_FAILED
    assert caplog.text.count("RuntimeError: no such shop") == MOST_FORK_SERVERS
    assert "No fork server can be started, and no worker is left: stopping" in caplog.text
    assert not shop._fork_server.is_open


def test_while_there_are_workers_another_fork_server_is_tried_for_ever(shop, child):
    take_in(shop, child)
    shop._failed_fork_servers = MOST_FORK_SERVERS
    shop._replace_fork_server("is no good")
    assert do_next(shop) != 0.0

    assert not shop._is_draining
    assert shop._fork_server.is_open
    hear(shop)
    assert shop._failed_fork_servers == 0


def test_where_no_process_is_to_be_had_the_next_fork_server_is_tried_later(
    shop, clock, caplog, monkeypatch
):
    def refuse(*_):
        raise BlockingIOError("no more processes")

    with monkeypatch.context() as patch:
        patch.setattr(multiprocessing.util, "spawnv_passfds", refuse)
        shop._replace_fork_server("is no good")
        assert alarms(shop) == [(1.0, "_start_fork_server")]
        assert "No fork server can be started: no more processes" in caplog.text
        # Nor is the one replaced that is not there.
        clock.now += 2 * IMPORT_WITHIN
        shop._tend()
        shop._alarms.pop()
        do_next(shop)
    do_next(shop)
    hear(shop)

    assert shop._fork_server.is_started
    assert shop._failed_fork_servers == 0


def test_no_fork_server_is_started_at_shutdown(stuck):
    stuck._drain()
    os.kill(stuck._fork_server._process.pid, signal.SIGKILL)
    hear(stuck)

    assert not stuck._fork_server.is_open
    assert stuck._alarms == []


# -- signals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_drains_and_the_second_stops_at_once(supervisor, child, caplog, number):
    caplog.set_level(logging.INFO)
    take_in(supervisor, child)
    supervisor._obey(number)
    assert supervisor._is_draining
    assert posted(supervisor) == [("drain",)]
    assert (child.death, supervisor._alarms) == (None, [])
    supervisor._obey(number)

    assert child.death.reason == "shutdown"
    assert child.process.wait(5) == -signal.SIGKILL
    assert posted(supervisor) == []
    assert caplog.messages == [
        f"{number.name}: stopping after the running tasks",
        f"{number.name}: stopping at once",
    ]


def test_a_quit_stops_at_once(supervisor, child):
    take_in(supervisor, child)
    supervisor._obey(signal.SIGQUIT)

    assert child.death.reason == "shutdown"
    assert posted(supervisor) == [("drain",)]


def test_running_tasks_have_as_long_as_the_application_says(make_supervisor, child):
    supervisor = make_supervisor(shutdown_timeout=7)
    take_in(supervisor, child)
    supervisor._obey(signal.SIGTERM)
    assert child.death is None
    assert do_next(supervisor) == 7.0

    assert child.death.reason == "shutdown"


def test_at_shutdown_nothing_new_is_brought(supervisor):
    supervisor._obey(signal.SIGTERM)

    assert all(service._stopping.is_set() for service in supervisor._bringing)
    assert not any(service._stopping.is_set() for service in supervisor._guarding)


def test_the_stacks_of_all_workers_are_logged_on_demand(supervisor, make_child, caplog):
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # which a new process inherits
    children = [make_child(slot) for slot in (1, 2)]
    signal.signal(signal.SIGUSR1, before)
    take_in(supervisor, *children)
    supervisor._obey(signal.SIGUSR1)
    for child in children:
        os.write(child.stacks_fd, f"in slot {child.slot}".encode())
    assert do_next(supervisor) == STACKS_AFTER

    for child in children:
        assert f"Stacks of {child}:\nin slot {child.slot}" in caplog.text
