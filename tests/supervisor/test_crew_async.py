"""How a crew spreads claims where an application has tasks of both kinds; frames are caught, and nothing is run."""

import contextlib
import os
import socket
import types

import pytest

from wakaq import WakaQ
from wakaq.frames import SLOTS, Channel, Progress
from wakaq.supervisor.child import Child
from wakaq.supervisor.crew import Crew
from wakaq.turn import Claim, Lane

ASYNC = b'{"name": "doze", "args": [], "kwargs": {}}'
ROWS = [Progress() for _ in range(3)]  # their shared memory lasts as long as the process
SYNC = b'{"name": "note", "args": [], "kwargs": {}}'


@pytest.fixture
def make():
    """Return a function that makes a crew of so many children, with what is sent to each."""
    with contextlib.ExitStack() as stack:

        def make(count, **options):
            app = WakaQ(queues=["default"], **options)

            @app.task
            async def doze(): ...

            @app.task
            def note(): ...

            sent = {number: [] for number in range(1, count + 1)}
            crew = Crew(app, lambda child, frame: sent[child.number].extend(frame.payloads))
            children = []
            for number in sent:
                ours, theirs = socket.socketpair()
                process = types.SimpleNamespace(pid=os.getpid(), sentinel=-1)
                child = Child(
                    number, process, Channel(ours), ROWS[number - 1], os.dup(ours.fileno())
                )
                stack.callback(theirs.close)
                stack.callback(ours.close)
                stack.callback(os.close, child.stacks_fd)
                stack.callback(os.close, child.end_fd)
                child.is_ready = True
                crew.join(child)
                crew.update(child)
                children.append(child)
            return crew, children, sent

        yield make


def claims(number, *payloads):
    queue = WakaQ(queues=["default"]).default_queue
    lane = Lane("w", queue, number, f"lane {number}")
    return [Claim(lane, payload) for payload in payloads]


def test_a_child_gets_all_the_sync_work_ahead_that_was_claimed_for_it(make):
    crew, (child,), sent = make(1)
    for size in (1, 2, 4, 8):
        crew.distribute(claims(1, *[SYNC] * size))
        child.observe(size, size * 1e-6)
        child.take_back(list(child.assigned))
        crew.update(child)
        sent[1].clear()

    ((_, room),) = crew.wants(0.0)
    surplus = crew.distribute(claims(1, *[SYNC] * room))

    assert room >= 16
    assert surplus == []
    assert sent[1] == [SYNC] * room


def test_a_child_gets_each_kind_as_far_as_it_has_room_and_others_get_the_rest(make):
    crew, (first, second), sent = make(2, async_concurrency=3)

    surplus = crew.distribute(claims(1, ASYNC, ASYNC, SYNC, ASYNC, SYNC, ASYNC, ASYNC, SYNC))

    assert (sent[1].count(SYNC), sent[1].count(ASYNC)) == (1, 3)
    assert (sent[2].count(SYNC), sent[2].count(ASYNC)) == (1, 2)
    assert [claim.payload for claim in surplus] == [SYNC]
    assert len(first.async_slots) == 3
    assert second.waiting == 1


def test_async_work_goes_to_whoever_runs_least_of_it(make):
    crew, children, _ = make(3, async_concurrency=10)
    watcher = 0
    for _ in range(9):
        assert crew.distribute(claims(watcher, ASYNC)) == []

    assert [len(child.async_slots) for child in children] == [3, 3, 3]


def test_a_child_that_is_full_of_one_kind_is_given_the_other(make):
    crew, (child,), sent = make(1, async_concurrency=2)
    crew.distribute(claims(1, ASYNC, ASYNC))

    assert crew.wants(0.0) == [(1, 1)]
    assert crew.distribute(claims(1, SYNC)) == []
    assert sent[1] == [ASYNC, ASYNC, SYNC]
    assert crew.wants(0.0) == []
    assert child.waiting == 1


def test_work_that_arrives_is_wanted_as_long_as_some_kind_would_start_at_once(make):
    crew, _, _ = make(1, async_concurrency=1)
    assert crew.has_idle(0.0)
    crew.distribute(claims(1, SYNC))
    assert crew.has_idle(0.0), "an async task would start"
    crew.distribute(claims(1, ASYNC))
    assert not crew.has_idle(0.0)


def test_after_a_kind_that_nobody_could_take_the_next_look_waits(make):
    crew, _, _ = make(1, async_concurrency=5)
    crew.distribute(claims(1, SYNC))

    assert len(crew.distribute(claims(1, SYNC))) == 1
    assert crew.wants(0.0) == []
    (probe,) = crew.next_moments(0.0)
    assert crew.wants(probe - 0.001) == []
    assert crew.wants(probe) == [(1, 1)]
    assert crew.next_moments(probe) == []


def test_nothing_is_placed_where_this_very_turn_took_the_last_slot(make):
    crew, (full, busy), sent = make(2, async_concurrency=SLOTS)
    slots = full.assign(claims(1, *[ASYNC] * (SLOTS - 8)))
    full.async_slots.update(dict.fromkeys(slots, 1.0))
    busy.assign(claims(2, SYNC))
    for child in (full, busy):
        crew.update(child)
    busy.is_retiring = True

    surplus = crew.distribute([*claims(1, *[ASYNC] * 8), *claims(2, SYNC)])

    assert sent[1] == [ASYNC] * 8
    assert [claim.payload for claim in surplus] == [SYNC]
