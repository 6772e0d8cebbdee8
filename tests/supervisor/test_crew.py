"""Who gets what: claims and broadcasts over several workers."""

import pytest

from wakaq.frames import SLOTS, Assign, Recall, Stop
from wakaq.supervisor.child import HORIZON, LONG
from wakaq.supervisor.crew import MOST_IN_TURN, Crew
from wakaq.turn import Claim, Settlement

NEVER = float("inf")  # a moment at which everything is due
SYNC, ASYNC = b'{"name": "sync"}', b'{"name": "coroutine"}'


class Sent(list):
    def __call__(self, child, frame):
        self.append((child.number, frame))


@pytest.fixture
def sent():
    return Sent()


@pytest.fixture
def crew(app, sent):
    del app.tasks["coroutine"]
    return Crew(app, sent)


@pytest.fixture
def mixed(app, sent):
    return Crew(app, sent)


def join(crew, *children):
    for child in children:
        crew.join(child)
        crew.update(child)
    return children


def test_each_idle_worker_wants_one_task_at_first(crew, make_child):
    join(crew, *(make_child(number) for number in (1, 2, 3)))

    assert sorted(crew.wants(0.0)) == [(1, 1), (2, 1), (3, 1)]
    assert crew.has_idle(0.0)


def test_those_with_least_to_do_come_first(crew, make_child):
    busy, idle = join(crew, make_child(1), make_child(2))
    for child in (busy, idle):
        child._window = 8
        child.observe(1, 0.001)
    busy.have("a")
    crew.update(busy)

    assert [number for number, _ in crew.wants(0.0)] == [2, 1]


def test_not_all_of_many_claim_in_one_turn(crew, make_child):
    join(crew, *(make_child(number) for number in range(1, MOST_IN_TURN + 3)))

    assert len(crew.wants(0.0)) == MOST_IN_TURN


def test_workers_that_boot_retire_or_are_full_want_nothing(crew, make_child):
    boots, retires, full = children = [make_child(number) for number in (1, 2, 3)]
    boots.is_ready, retires.is_retiring = False, True
    full.have("a")
    join(crew, *children)

    assert crew.wants(0.0) == []
    assert not crew.has_idle(0.0)


def test_claims_go_to_the_worker_that_they_were_made_for_in_one_frame(crew, child, sent):
    join(crew, child)
    high, low = child.lanes
    claims = [Claim(high, b"1"), Claim(low, b"2"), Claim(low, b"3")]

    assert crew.distribute(claims) == []
    assert [(frame.queue, frame.lane, frame.payloads) for _, frame in sent] == [
        (0, 1, [b"1"]),
        (1, 1, [b"2", b"3"]),
    ]
    assert list(child.assigned.values()) == claims


def test_a_claim_of_a_worker_that_is_gone_goes_to_an_idle_one(crew, make_child, sent):
    gone, idle = join(crew, make_child(1), make_child(2))
    crew.leave(gone)

    assert crew.distribute([Claim(gone.lanes[1], b"1")]) == []
    ((number, frame),) = sent
    assert number == 2
    assert frame.lane == 1  # where it still is, in Redis
    assert list(idle.assigned.values()) == [Claim(gone.lanes[1], b"1")]


def test_what_nobody_can_take_is_returned(crew, child, sent):
    child.is_retiring = True
    join(crew, child)
    claims = [Claim(child.lanes[1], b"1")]

    assert crew.distribute(claims) == claims
    assert sent == []


def test_what_waits_behind_a_long_task_is_asked_back_once(crew, child, sent):
    join(crew, child)
    child.run("a", "b", now=100.0)
    crew.update(child)
    assert crew.has_waiting()
    crew.recall(100.0 + LONG / 2)
    assert sent == []
    crew.recall(100.1 + LONG)
    crew.recall(100.2 + LONG)

    assert sent == [(1, Recall())]


def test_a_broadcast_is_run_before_what_could_be_claimed_for_a_foreseen_end(crew, child, sent):
    join(crew, child)
    child.observe(1, 2 * LONG)
    child.observe(1, 2 * LONG)
    child.have("a")
    crew.update(child)
    crew.relay_later(SYNC)
    crew.relay(NEVER)
    crew.anticipate(crew.next_moments(NEVER)[0] - HORIZON)
    assert sent == []
    crew.anticipate(NEVER)

    assert [frame.payloads for _, frame in sent] == [[SYNC]]


def test_a_worker_that_is_gone_is_not_looked_at_when_its_task_was_to_end(crew, child):
    join(crew, child)
    child.observe(1, 2 * LONG)
    child.observe(1, 2 * LONG)
    child.have("a")
    crew.update(child)
    assert crew.next_moments(0.0)
    crew.leave(child)

    assert crew.next_moments(0.0) == []


def test_a_retiring_worker_is_dismissed_once_when_it_has_nothing_left(crew, child, sent):
    join(crew, child)
    slots = child.have("a")
    child.is_retiring = True
    crew.dismiss_if_done(child)
    assert sent == []
    child.take_back(slots)
    crew.dismiss_if_done(child)
    crew.dismiss_if_done(child)

    assert sent == [(1, Stop())]
    assert child.stopped_at is not None


def test_async_and_sync_tasks_do_not_stand_in_each_others_way(mixed, child):
    join(mixed, child)
    low = child.lanes[1]
    assert mixed.distribute([Claim(low, SYNC), Claim(low, ASYNC), Claim(low, ASYNC)]) == []

    assert (child.waiting, len(child.async_slots)) == (1, 2)
    assert mixed.distribute([Claim(low, SYNC)]) == [Claim(low, SYNC)]
    assert mixed.distribute([Claim(low, ASYNC)]) == []


# -- broadcasts ------------------------------------------------------------------------------------


def relays(sent):
    return [(number, frame.payloads) for number, frame in sent if isinstance(frame, Assign)]


def test_a_broadcast_goes_to_an_idle_worker_as_urgent(crew, make_child, sent):
    busy, _ = join(crew, make_child(1), make_child(2))
    busy.have("a")
    crew.relay_later(SYNC)
    crew.relay(NEVER)

    assert relays(sent) == [(2, [SYNC])]
    ((_, frame),) = sent
    assert (frame.queue, frame.lane, frame.is_urgent) == (-1, -1, True)


def test_where_all_are_busy_the_first_to_be_free_gets_it_once(crew, make_child, sent):
    one, two = join(crew, make_child(1), make_child(2))
    one.have("a")
    two.have("b")
    crew.relay_later(SYNC)
    crew.relay(NEVER)
    assert sent == []
    crew.give_relay(two, NEVER)
    crew.give_relay(one, NEVER)

    assert relays(sent) == [(2, [SYNC])]


def test_several_broadcasts_go_one_to_each_idle_worker_in_their_order(crew, make_child, sent):
    join(crew, make_child(1), make_child(2))
    for payload in (b"1", b"2", b"3"):
        crew.relay_later(payload)
    crew.relay(NEVER)
    assert sorted(payload for _, (payload,) in relays(sent)) == [b"1", b"2"]
    assert {number for number, _ in relays(sent)} == {1, 2}
    (child,) = (child for child in crew.children if child.number == 1)
    child.take_back(list(child.assigned))
    crew.give_relay(child, NEVER)

    assert relays(sent)[2:] == [(1, [b"3"])]


def test_an_async_broadcast_goes_to_a_busy_worker_too_past_a_sync_one_that_waits(
    mixed, child, sent
):
    join(mixed, child)
    child.have("sync")
    mixed.relay_later(SYNC)
    mixed.relay_later(ASYNC)
    mixed.relay(NEVER)

    assert relays(sent) == [(1, [ASYNC])]
    assert len(child.async_slots) == 1
    mixed.give_relay(child, NEVER)
    assert relays(sent)[1:] == [(1, [SYNC])]


def test_no_broadcast_goes_to_a_worker_that_cannot_serve(crew, child, sent):
    child.is_ready = False
    join(crew, child)
    crew.relay_later(SYNC)
    crew.relay(NEVER)
    crew.give_relay(child, NEVER)
    assert sent == []
    child.is_ready = True
    crew.relay(NEVER)

    assert relays(sent) == [(1, [SYNC])]


def test_a_delayed_broadcast_waits_for_its_time(crew, child, sent):
    join(crew, child)
    crew.relay_later(SYNC, 1_000.0)
    (due,) = crew.next_moments(0.0)
    crew.relay(due - 0.1)
    crew.give_relay(child, due - 0.1)
    assert sent == []
    crew.relay(due)

    assert relays(sent) == [(1, [SYNC])]
    assert crew.next_moments(0.0) == []


@pytest.mark.parametrize(
    "case",
    [
        ("requeue", b"", SYNC),
        ("redeliver", b"new", b"new"),
        ("retry", b"new", b"new"),
        ("delay", b"new", b"new"),
        ("done", b"", None),
        ("dead", b"letter", None),
    ],
)
def test_a_broadcast_is_settled_here(crew, child, sent, case):
    action, new, again = case
    join(crew, child)
    crew.settle_relay(Settlement(None, action, [SYNC], new))
    crew.relay(NEVER)

    assert relays(sent) == ([(1, [again])] if again else [])


def test_a_broadcast_that_is_delayed_again_waits(crew, child, sent):
    join(crew, child)
    crew.settle_relay(Settlement(None, "delay", [SYNC], b"new", 1_000.0))
    (due,) = crew.next_moments(0.0)
    crew.relay(due - 1.0)
    assert sent == []
    crew.relay(due)

    assert relays(sent) == [(1, [b"new"])]


def test_a_broadcast_that_is_given_up_is_named_in_the_log(crew, caplog):
    crew.settle_relay(Settlement(None, "dead", [SYNC], b"letter"))

    assert "Broadcast sync() is given up, and leaves no dead letter" in caplog.text


def test_broadcasts_wait_where_no_worker_has_room_for_them(mixed, child, sent):
    join(mixed, child)
    for _ in range(2 * SLOTS):
        mixed.relay_later(ASYNC, 0.0)
    mixed.relay(float("inf"))
    given = len(child.async_slots)
    assert 0 < given < SLOTS
    child.take_back(list(child.async_slots)[:1])
    mixed.give_relay(child, float("inf"))

    assert len(child.async_slots) == given
    assert len(sent) == given + 1
