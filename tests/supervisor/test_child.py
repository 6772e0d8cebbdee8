"""How much a worker is given, what is told of it, and how it is killed."""

import os
import signal
import time

import pytest

from wakaq.frames import ASSIGNED, FINISHED, SLOTS, STARTED
from wakaq.supervisor.child import ALIKE, HORIZON, LONG, MOST_AHEAD, Death


def test_a_new_worker_gets_one_task_until_its_tasks_are_known(child):
    assert child.sync_room(0.001) == 1
    child.have("a")

    assert child.sync_room(0.001) == 0


def test_a_worker_is_given_more_step_by_step_as_its_tasks_prove_short(child):
    rooms = []
    for _ in range(10):
        room = child.sync_room(0.001)
        slots = child.have(*["a"] * room)
        child.observe(room, room * 1e-6)
        child.take_back(slots)
        rooms.append(room)

    assert rooms == [1, 2, 4, 8, 16, 32, 64, 128, 256, 256]


@pytest.mark.parametrize(
    ("duration", "most"), [(1.0, 1), (LONG, 1), (0.049, 2), (0.01, 2), (0.001, 8), (0.0001, 71)]
)
def test_the_longer_its_tasks_take_the_fewer_wait(child, duration, most):
    child._window = MOST_AHEAD
    child.observe(10, 10 * duration)

    assert child.sync_room(0.002) == most


def test_a_worker_is_filled_up_again_when_a_third_is_done(child):
    child._window = MOST_AHEAD
    child.observe(1, 0.001)
    slots = child.have(*["a"] * child.sync_room(0.002))
    assert len(slots) == 8
    child.take_back(slots[:2])
    assert child.sync_room(0.002) == 0
    child.take_back(slots[2:3])

    assert child.sync_room(0.002) == 3


@pytest.mark.parametrize(
    ("durations", "room"),
    [
        ([], 0),
        ([0.1], 0),
        ([0.1, 0.1 + 2 * ALIKE], 0),
        ([0.1, 0.1], 1),
        ([0.1, 1.0, 1.0], 1),
        ([1.0, 0.1, 1.0], 0),
    ],
)
def test_after_two_long_tasks_of_one_duration_the_end_of_the_third_is_expected(
    child, durations, room
):
    for duration in durations:
        child.observe(1, duration)
    child.have("a")
    assert child.sync_room(0.001) == 0
    child._ends_at -= child._steady  # as if this much time had passed

    assert child.sync_room(0.001) == room
    child.have("b")
    assert child.sync_room(0.001) == 0


def test_a_task_begins_when_it_is_assigned_or_the_one_before_it_has_ended(child):
    child.observe(1, 0.1)
    child.observe(1, 0.1)
    child._ends_at = 0.0
    slots = child.have("a")
    assert child._ends_at > time.monotonic()
    child._ends_at = 0.0
    child.have("b")
    assert child._ends_at == 0.0
    child.take_back(slots)
    assert child._ends_at > time.monotonic()
    child.progress.begin(1, 1000.0, None, None)
    child.take_back(child.have("c"))

    assert child._ends_at == 1000.1


@pytest.mark.parametrize("duration", [0.06, 0.1, 0.2, 60.0])
def test_what_waits_for_an_expected_end_is_too_much_before_and_when_that_does_not_come(
    child, duration
):
    child.observe(1, duration)
    child.observe(1, duration)
    child.run("a", "b", now=time.monotonic())
    before, until = child.next_at(0.002), child._ends_at + HORIZON

    assert child.has_too_much(before - 0.001, 0.002)
    assert not child.has_too_much(before, 0.002)
    assert not child.has_too_much(until, 0.002)
    assert child.has_too_much(until + 0.001, 0.002)


def test_nothing_more_is_given_to_a_worker_whose_task_did_not_end_when_expected(child):
    child.observe(1, 0.1)
    child.observe(1, 0.1)
    child.have("a")
    child._ends_at = time.monotonic() - 2 * HORIZON

    assert child.sync_room(0.0) == 0


def test_a_worker_gets_no_more_than_it_has_left(child):
    child.left = 3
    child._window = MOST_AHEAD
    child.observe(1, 0.0001)
    assert child.sync_room(0.0) == 3
    slots = child.have("a", "b", "c")
    assert (child.left, child.can_serve) == (0, False)
    child.recalled(slots[1:])

    assert (child.left, child.can_serve) == (2, True)


def test_a_worker_has_begun_its_last_task_when_nothing_can_come_back_before_it(child):
    child.left = 2
    assert not child.has_begun_its_last()
    slots = child.have("a", "b")
    assert not child.has_begun_its_last()
    child.take_back(slots[:1])
    assert child.has_begun_its_last()
    child.is_recalling = True
    assert not child.has_begun_its_last()
    child.is_recalling, child.is_retiring = False, True

    assert not child.has_begun_its_last()


def test_async_tasks_have_room_of_their_own(child):
    child.have("a", "b", is_async=True)

    assert child.is_idle
    assert child.waiting == 0
    assert child.async_room(5) == 3
    assert child.async_room(2) == 0
    assert child.async_room(0) == SLOTS - 2 * MOST_AHEAD - 2
    assert child.sync_room(0.0) == 1


def test_slots_are_used_again(child):
    slots = child.have("a")
    assert child.progress.states[slots[0]] == ASSIGNED
    assert [claim.lane for claim in child.take_back(slots)] == [child.lanes[1]]

    assert child.have("b") == slots


def test_what_waits_behind_a_long_task_is_too_much(child):
    child.run("a", "b", now=100.0)

    assert not child.has_too_much(100.0 + LONG, 0.0)
    assert child.has_too_much(100.001 + LONG, 0.0)
    child.is_recalling = True
    assert not child.has_too_much(100.001 + LONG, 0.0)


def test_a_long_task_alone_is_not_too_much(child):
    child.run("a", now=100.0)

    assert not child.has_too_much(200.0, 0.0)


def test_a_kill_ends_the_process_and_its_group_and_keeps_the_first_reason(child):
    child.kill(Death("first"))
    child.kill(Death("second"))

    assert child.reap() == -signal.SIGKILL
    assert child.death.reason == "first"


def test_a_reaped_worker_is_not_signalled_any_more(child):
    child.process.end()
    child.reap()
    child.signal(signal.SIGTERM)
    child.kill(Death("late"))

    assert child.death is None


def test_a_signal_reaches_the_worker(child):
    child.signal(signal.SIGTERM)

    assert child.reap() == -signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)


def test_a_worker_serves_when_it_is_ready_and_the_first_of_its_number_and_stays(child):
    assert child.can_serve
    assert child.is_idle
    for name, value in (("is_ready", False), ("is_first", False), ("is_retiring", True)):
        setattr(child, name, value)
        assert not child.can_serve, name
        assert not child.is_idle, name
        setattr(child, name, not value)

    assert child.can_serve


# -- what is told of it ----------------------------------------------------------------------------


def test_a_worker_is_told_by_its_number_and_its_pid(child):
    assert str(child) == f"Worker 1 (pid {child.pid})"


def test_what_runs_is_told_as_calls_with_the_moment_of_their_start(child):
    (slot, _) = child.run("a", "b", now=100.0)
    (beside, waits) = child.have("c", "d", is_async=True)
    child.async_slots[beside] = 103.0
    child.progress.states[beside] = STARTED

    assert list(child.running()) == [(slot, 100.0, "a()"), (beside, 103.0, "c()")]
    assert child.describe_running() == "a(), c()"
    child.progress.states[slot] = FINISHED
    child.take_back([waits])
    assert child.describe_running() == "c()"
    child.take_back([beside])
    assert child.describe_running() == ""


def test_stacks_are_those_that_were_asked_for_last(child):
    signals = []
    child.signal = signals.append
    os.write(child.stacks_fd, b"what was written for somebody else")
    child.ask_for_stacks()
    assert signals == [signal.SIGUSR1]
    assert child.read_stacks() == ""
    os.write(child.stacks_fd, b"in time.sleep\xff")

    # However often: to read does not move where the worker writes.
    assert child.read_stacks() == child.read_stacks() == "in time.sleep\ufffd"


def test_behind_a_task_that_takes_long_nothing_more_is_claimed(child):
    child._window = MOST_AHEAD
    child.observe(10, 10 * 0.0001)
    assert child.sync_room(0.001) > 1
    child.run("a", now=time.monotonic() - LONG - 0.01)

    # It would only be recalled, again and again.
    assert child.sync_room(0.001) == 0
    child.progress.end()
    assert child.sync_room(0.001) > 1
