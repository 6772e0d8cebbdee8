"""How much a worker is given ahead, and when it is asked back; each at a time of ours."""

import math

import pytest

from wakaq.progress import ROWS
from wakaq.supervisor import prefetch
from wakaq.supervisor.child import State
from wakaq.supervisor.prefetch import AHEAD, LONG, MOST_AHEAD, MOST_ASYNC

NOW, ROUND_TRIP = 1_000.0, 0.002


def room(child, now=NOW):
    return prefetch.sync_room(child, now, ROUND_TRIP)


@pytest.fixture
def short(child):
    """A worker whose tasks take a millisecond, and have done so for long."""
    child.window = MOST_AHEAD
    prefetch.observe(child, 10, 10 * 0.001)
    return child


# -- sync tasks ------------------------------------------------------------------------------------


def test_a_new_worker_gets_one_task_until_its_tasks_are_known(child):
    assert room(child) == 1
    child.have("a")

    assert room(child) == 0


def test_a_worker_gets_no_more_ahead_than_its_window_which_begins_at_one(child):
    prefetch.observe(child, 1, 1e-6)
    rooms = [room(child)]
    for child.window in (2, 64, MOST_AHEAD, 2 * MOST_AHEAD):
        rooms.append(room(child))

    assert rooms == [1, 2, 64, MOST_AHEAD, MOST_AHEAD]


def test_the_window_is_twice_as_wide_after_most_of_it_was_used(child):
    windows = []
    for given in (1, 1, 1, 2, 3, 4, 100):
        prefetch.widen(child, given)
        windows.append(child.window)
    assert windows == [2, 4, 4, 8, 8, 16, 32]
    for _ in range(9):
        prefetch.widen(child, MOST_AHEAD)

    assert child.window == MOST_AHEAD


@pytest.mark.parametrize(
    ("duration", "most"), [(1.0, 1), (LONG, 1), (0.049, 2), (0.01, 2), (0.001, 8), (0.0001, 71)]
)
def test_the_longer_its_tasks_take_the_fewer_are_given_ahead(child, duration, most):
    child.window = MOST_AHEAD
    prefetch.observe(child, 10, 10 * duration)

    assert room(child) == most


def test_what_is_ahead_fills_a_few_milliseconds_and_a_round_trip(short):
    for round_trip in (0.0, 0.002, 0.05):
        ahead = math.ceil((AHEAD + round_trip) / 0.001)
        assert prefetch.sync_room(short, NOW, round_trip) == 1 + ahead


def test_a_worker_is_filled_up_again_when_half_is_done(short):
    rows = short.have(*["a"] * room(short))
    assert len(rows) == 8
    short.release(rows[:3])
    assert room(short) == 0
    short.release(rows[3:4])

    assert room(short) == 4


def test_long_tasks_come_one_at_a_time(child):
    child.window = MOST_AHEAD
    prefetch.observe(child, 1, LONG)
    (row,) = child.have("a")
    assert room(child) == 0
    child.release([row])

    assert room(child) == 1


def test_behind_a_task_that_takes_long_nothing_more_is_claimed(short):
    assert room(short) > 1
    short.run("a", now=NOW - LONG - 0.001)

    # It would only be recalled, again and again.
    assert room(short) == 0
    short.progress.end()
    assert room(short) > 1


def test_the_average_follows_the_tasks_and_many_count_more_than_one(child):
    prefetch.observe(child, 4, 4.0)
    assert child.average == 1.0
    prefetch.observe(child, 1, 2.0)
    assert child.average == pytest.approx(1.1)
    prefetch.observe(child, 100, 310.0)

    assert child.average == pytest.approx(2.1)


def test_a_worker_gets_no_more_than_it_has_left(short):
    short.left = 3

    assert room(short) == 3
    assert prefetch.async_room(short, 10) == 3
    short.have("a", "b", "c")
    assert (room(short), prefetch.async_room(short, 10)) == (0, 0)


def test_a_worker_gets_no_more_than_it_has_rows(short):
    short.average = 1e-6
    assert room(short) == MOST_AHEAD
    short.have(*["a"] * (ROWS - 5), is_async=True)

    assert room(short) == 5
    assert prefetch.async_room(short, 2 * ROWS) == 5


@pytest.mark.parametrize("state", State)
def test_only_a_worker_that_serves_takes_work(child, state):
    child.state = state
    is_serving = state is State.SERVING

    assert prefetch.takes_work(child) == prefetch.is_idle(child) == is_serving
    assert (room(child), prefetch.async_room(child, 1)) == (int(is_serving), int(is_serving))


@pytest.mark.parametrize(
    ("name", "value"), [("is_reserved", True), ("runs_suspect", True), ("left", 0)]
)
def test_a_worker_takes_no_work_that_is_for_a_suspect_or_has_had_its_last(child, name, value):
    setattr(child, name, value)

    assert not prefetch.takes_work(child)
    assert not prefetch.is_idle(child)
    assert (room(child), prefetch.async_room(child, 1)) == (0, 0)


# -- async tasks -----------------------------------------------------------------------------------


def test_async_tasks_have_room_of_their_own(child):
    child.have("a", "b", is_async=True)

    assert prefetch.is_idle(child)
    assert prefetch.async_room(child, 5) == 3
    assert prefetch.async_room(child, 2) == 0
    assert prefetch.async_room(child, 0) == MOST_ASYNC - 2
    assert room(child) == 1


def test_a_sync_task_takes_no_room_from_async_ones(child):
    child.have("a")

    assert not prefetch.is_idle(child)
    assert prefetch.async_room(child, 5) == 5


# -- whether it can take a sync task soon ----------------------------------------------------------


def test_a_worker_is_blocked_by_a_task_of_unknown_or_long_duration(child):
    assert not prefetch.is_blocked(child, NOW)
    child.run("a", now=NOW)
    assert prefetch.is_blocked(child, NOW)
    child.average = LONG
    assert prefetch.is_blocked(child, NOW)
    child.average = LONG / 2

    assert not prefetch.is_blocked(child, NOW)
    assert prefetch.is_blocked(child, NOW + LONG + 0.001)


def test_a_worker_with_async_tasks_alone_is_not_blocked(child):
    child.have("a", is_async=True)

    assert not prefetch.is_blocked(child, NOW)


# -- what is asked back ----------------------------------------------------------------------------


def test_what_waits_behind_a_long_task_is_too_much(child):
    child.run("a", "b", now=NOW)

    assert not prefetch.has_too_much(child, NOW + LONG, 0.0)
    assert prefetch.has_too_much(child, NOW + LONG + 0.001, 0.0)
    child.is_recalling = True
    assert not prefetch.has_too_much(child, NOW + LONG + 0.001, 0.0)


def test_a_long_task_alone_is_not_too_much(child):
    child.run("a", now=NOW)

    assert not prefetch.has_too_much(child, NOW + 100.0, 0.0)


def test_async_tasks_do_not_wait_behind_a_long_task(child):
    child.run("a", now=NOW)
    child.have("b", "c", is_async=True)

    assert not prefetch.has_too_much(child, NOW + 100.0, 0.0)


def test_what_waits_for_more_than_it_was_given_for_is_too_much(child):
    """As when the tasks turn out to take longer than those before them."""
    child.run(*"abcd", now=NOW)
    child.average = (2 * LONG + ROUND_TRIP) / 3
    assert not prefetch.has_too_much(child, NOW, ROUND_TRIP)
    child.average += 0.001

    assert prefetch.has_too_much(child, NOW, ROUND_TRIP)
    assert not prefetch.has_too_much(child, NOW, ROUND_TRIP + 0.01)


def test_one_that_waits_behind_one_of_middling_length_is_not_too_much(child):
    child.run("a", "b", now=NOW)
    child.average = 10.0

    assert not prefetch.has_too_much(child, NOW + LONG, 0.0)
