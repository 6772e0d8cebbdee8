"""Who gets what, and what becomes of it: the dispatcher's steps, for workers that the test plays.

Frames are really sent, and nothing reaches Redis: see `test_dispatcher_turns` for that.
"""

import selectors

import pytest

from wakaq.channel import Assign, Done, Failed, Outcome, Ready, Recall, Recalled, Stop
from wakaq.progress import FINISHED, STARTED
from wakaq.store.settlement import Action, Settlement
from wakaq.supervisor import prefetch
from wakaq.supervisor.child import State
from wakaq.supervisor.dispatcher import MOST_IN_TURN
from wakaq.supervisor.prefetch import LONG, MOST_AHEAD

NOW = 1_000.0
SYNC, ASYNC = b'{"name": "sync"}', b'{"name": "coroutine"}'
SUSPECT = b'{"name": "sync", "redelivered": 1}'
ASYNC_SUSPECT = b'{"name": "coroutine", "redelivered": 1}'


def heard(child):
    """Return what the worker was sent since the last call."""
    return child.theirs.receive()


def kinds(child):
    return [type(frame) for frame in heard(child)]


def demand(stage, now=NOW):
    return stage.dispatcher._demand(stage.group, now)


def make_short(*children):
    """Have the tasks of workers be short, and have been so for long."""
    for child in children:
        child.window, child.average = 8, 0.001


# -- a worker's life -------------------------------------------------------------------------------


def test_a_worker_serves_when_it_is_ready_and_the_main_thread_is_told(stage):
    child = stage.join(is_ready=False)
    assert (child.state, child.has_served) == (State.STARTING, False)
    assert demand(stage) == 0
    stage.say(child, Ready())

    assert (child.state, child.has_served) == (State.SERVING, True)
    assert stage.changed == [child]
    assert demand(stage) == 1


def test_why_a_worker_cannot_boot_is_known_when_it_is_gone(stage):
    child = stage.join(is_ready=False)
    stage.say(child, Failed("no module named shop"))
    stage.die(child)

    assert (child.state, child.boot_failure) == (State.GONE, "no module named shop")
    assert stage.changed == [child]


def test_a_worker_that_is_to_retire_ends_what_it_has_and_is_told_to_exit_once(stage):
    child = stage.join()
    (claim,) = stage.hand_out(SYNC)
    stage.dispatcher.retire_child(child)
    stage.dispatcher.retire_child(child)
    assert (child.state, demand(stage)) == (State.RETIRING, 0)
    assert kinds(child) == [Assign, Recall]
    stage.say(child, Recalled([]))
    stage.finish(child)
    stage.dispatcher.retire_child(child)

    assert kinds(child) == [Stop]
    assert child.state is State.STOPPING
    assert child.stopped_at is not None
    assert stage.acked() == [claim]


def test_a_worker_with_nothing_to_do_retires_at_once_and_one_that_boots_does(stage):
    idle, boots = stage.join(1), stage.join(2, is_ready=False)
    for child in (idle, boots):
        stage.dispatcher.retire_child(child)
        assert kinds(child) == [Recall, Stop]
    stage.say(boots, Ready())

    assert boots.state is State.STOPPING
    assert demand(stage) == 0


def test_a_worker_retires_after_so_many_tasks(make_stage):
    stage = make_stage(max_tasks_per_worker=3)
    child = stage.join()
    make_short(child)
    assert demand(stage) == 3
    stage.hand_out(SYNC, SYNC, SYNC)
    rows = list(child.assigned)
    assert demand(stage) == 0
    stage.finish(child, *rows[:2])
    assert kinds(child) == [Assign]
    stage.finish(child, rows[2])

    assert kinds(child) == [Stop]


def test_what_a_worker_gives_back_is_not_of_its_number_of_tasks(make_stage):
    stage = make_stage(max_tasks_per_worker=3)
    child = stage.join()
    make_short(child)
    claims = stage.hand_out(SYNC, SYNC, SYNC)
    running, *rows = child.assigned
    child.progress.begin(running, 0.0, None, None)
    stage.step()
    stage.finish(child, running)
    # It has nothing begun and nothing left, but for what comes back.
    assert kinds(child) == [Assign, Recall]
    stage.say(child, Recalled(rows))

    assert kinds(child) == []
    assert (child.state, child.left) == (State.SERVING, 2)
    assert stage.acked() == claims[:1]
    assert stage.requeued() == claims[1:]


def test_what_a_worker_had_is_settled_when_it_is_gone(stage):
    child = stage.join()
    make_short(child)
    claims = stage.hand_out(SYNC, SYNC, SYNC)
    states = zip(child.assigned, (FINISHED, STARTED), strict=False)
    for row, state in states:
        child.progress.states[row] = state
    stage.die(child)

    assert stage.acked() == claims[:1]
    assert stage.settled() == [(Action.REQUEUE, claims[2]), (Action.REDELIVER, claims[1])]
    assert (child.state, child.assigned, child.was_running) == (State.GONE, {}, "sync()")
    assert stage.changed[-1] is child


def test_what_a_worker_had_sent_is_heard_although_something_holds_its_channel_open(stage):
    child = stage.join()
    (claim,) = stage.hand_out(SYNC)
    child.theirs.send(Done(list(child.assigned), 1, 0.1))
    stage.dispatcher.end_child(child)
    stage.dispatcher.end_child(child)

    assert stage.acked() == [claim]
    assert child.state is State.GONE
    assert stage.changed == [child, child]  # ready, gone


def test_a_worker_that_is_gone_is_neither_retired_nor_sent_anything(stage):
    child = stage.join()
    stage.die(child)
    stage.dispatcher.retire_child(child)
    stage.dispatcher.flush_later(child)

    assert child.state is State.GONE


def test_what_a_channel_does_not_take_is_sent_as_soon_as_it_does(stage):
    child = stage.join()
    claims = stage.hand_out(b'{"name": "sync", "args": ["%s"]}' % (b"x" * 1_000_000))
    assert not child.channel.is_flushed
    frames = []
    while not frames:
        frames = heard(child)
        stage.step()

    assert child.channel.is_flushed
    assert frames[0].payloads == [claims[0].payload]
    # And nothing wakes the dispatcher any more.
    assert stage.dispatcher._selector.get_key(child.channel).events == selectors.EVENT_READ


# -- outcomes --------------------------------------------------------------------------------------


def test_what_a_worker_reports_is_settled_and_its_rows_are_free(stage):
    child = stage.join()
    make_short(child)
    claims = stage.hand_out(SYNC, SYNC, SYNC)
    first, second, third = child.assigned
    settlement = Settlement(Action.RETRY, b"new")
    stage.say(child, Done([first], 1, 0.1), Outcome.of(second, settlement))

    assert stage.acked() == claims[:1]
    assert stage.group.inflight.settlements == [(claims[1], settlement)]
    assert list(child.assigned) == [third]


def test_the_duration_of_tasks_is_learned_from_what_a_worker_reports(stage):
    child = stage.join()
    stage.hand_out(SYNC)
    stage.finish(child, busy=0.3)
    assert child.average == 0.3
    stage.hand_out(SYNC)
    stage.say(child, Done(list(child.assigned), 0, 0.0))

    assert child.average == 0.3


# -- handing out -----------------------------------------------------------------------------------


def test_each_idle_worker_wants_one_task_at_first(stage):
    for slot in (1, 2, 3):
        stage.join(slot)

    assert demand(stage) == 3


def test_a_worker_wants_twice_as_many_as_long_as_its_tasks_prove_short(stage):
    child = stage.join()
    rooms = []
    for _ in range(12):
        rooms.append(demand(stage))
        stage.hand_out(*[SYNC] * rooms[-1])
        stage.finish(child, busy=1e-6)

    assert rooms == [min(2**exponent, MOST_AHEAD) for exponent in range(12)]


def test_not_everything_is_claimed_in_one_turn(stage):
    children = [stage.join(slot) for slot in range(1, 18)]
    for child in children:
        child.window, child.average = MOST_AHEAD, 1e-6

    assert demand(stage) == MOST_IN_TURN


def test_claims_are_shared_evenly_in_runs_without_gaps(stage):
    children = [stage.join(slot) for slot in (1, 2, 3)]
    make_short(*children)
    claims = stage.hand_out(*[SYNC] * 12)

    shares = [child.claims for child in children]
    assert sorted(shares, key=lambda share: share[0].number) == [
        claims[:4],
        claims[4:8],
        claims[8:],
    ]
    assert stage.settled() == []


def test_those_with_least_to_do_come_first(stage):
    busy, idle = stage.join(1), stage.join(2)
    make_short(busy, idle)
    busy.have("a", "b")
    first, second, third = stage.hand_out(SYNC, SYNC, SYNC)

    assert idle.claims == [first, second]
    assert busy.claims[2:] == [third]


def test_what_exceeds_a_workers_room_goes_to_the_others(stage):
    new, known = stage.join(1), stage.join(2)
    make_short(known)
    claims = stage.hand_out(*[SYNC] * 5)

    assert sorted(map(len, (new.claims, known.claims))) == [1, 4]
    assert stage.settled() == []
    assert {id(claim) for claim in new.claims + known.claims} == set(map(id, claims))


def test_what_nobody_can_take_goes_back_in_its_order(stage):
    child = stage.join()
    claims = stage.hand_out(SYNC, SYNC, SYNC)

    assert child.claims == claims[:1]
    assert stage.requeued() == claims[1:]


def test_workers_that_boot_retire_or_are_full_get_nothing(stage):
    boots, retires, full = stage.join(1, is_ready=False), stage.join(2), stage.join(3)
    stage.dispatcher.retire_child(retires)
    full.have("a")
    assert demand(stage) == 0
    claims = stage.hand_out(SYNC)

    assert stage.requeued() == claims
    assert boots.claims == retires.claims == []


def test_an_assignment_says_where_redis_has_it(stage):
    child = stage.join()
    make_short(child)
    stage.group.inflight.supervisor_id = "me"
    high, low = stage.app.queues
    claims = [*stage.claims(b"1", queue=high), *stage.claims(b"2", b"3", queue=low)]
    stage.dispatcher._hand_out(claims)
    rows = list(child.assigned)

    assert heard(child) == [
        Assign("me", 0, rows[:1], [1], [b"1"]),
        Assign("me", 1, rows[1:], [2, 3], [b"2", b"3"]),
    ]


# -- recall ----------------------------------------------------------------------------------------


def run_long(stage, child):
    """Have a worker run a task for long, with two behind it; returns the claims of these."""
    make_short(child)
    _, *claims = stage.hand_out(SYNC, SYNC, SYNC)
    running, *rows = child.assigned
    child.progress.begin(running, 0.0, None, None)
    return rows, claims


def test_what_waits_behind_a_long_task_is_asked_back_once_and_requeued_in_order(stage):
    child = stage.join()
    rows, claims = run_long(stage, child)
    stage.step()
    stage.step()
    assert kinds(child) == [Assign, Recall]
    stage.say(child, Recalled(rows))

    assert stage.requeued() == claims
    assert not child.is_recalling


def test_the_dispatcher_looks_again_while_something_waits(stage):
    child = stage.join()
    make_short(child)
    stage.hand_out(SYNC, SYNC)
    assert stage.dispatcher._wait(NOW) <= LONG
    stage.finish(child, next(iter(child.assigned)))

    assert stage.dispatcher._wait(NOW) > 10 * LONG


def test_a_worker_that_is_gone_is_not_asked(stage):
    child = stage.join()
    run_long(stage, child)
    stage.die(child)
    stage.step()

    assert stage.dispatcher._wait(NOW) > 10 * LONG


# -- async tasks -----------------------------------------------------------------------------------


@pytest.fixture
def mixed(make_stage):
    """`mixed(count, **options)` returns a stage with async tasks, and its workers."""

    def make(count=1, **options):
        stage = make_stage(has_async=True, **options)
        return stage, *(stage.join(slot) for slot in range(1, count + 1))

    return make


def counts(child):
    """Return how many sync and async tasks a worker has."""
    return child.sync_count, len(child.async_rows)


def test_async_and_sync_tasks_do_not_stand_in_each_others_way(mixed):
    stage, child = mixed()
    stage.hand_out(SYNC, ASYNC, ASYNC)
    assert counts(child) == (1, 2)
    (surplus,) = stage.hand_out(SYNC)
    assert stage.requeued() == [surplus]
    stage.hand_out(ASYNC)

    assert counts(child) == (1, 3)
    assert stage.settled() == []


def test_each_worker_gets_each_kind_as_far_as_it_has_room(mixed):
    stage, first, second = mixed(2, async_concurrency=3)
    claims = stage.hand_out(ASYNC, ASYNC, SYNC, ASYNC, SYNC, ASYNC, ASYNC, SYNC, ASYNC, ASYNC)

    assert counts(first) == counts(second) == (1, 3)
    assert stage.requeued() == [claims[7], claims[9]]


def test_async_work_goes_to_whoever_has_least_of_it(mixed):
    stage, *children = mixed(3, async_concurrency=10)
    for _ in range(9):
        stage.hand_out(ASYNC)

    assert [counts(child) for child in children] == [(0, 3)] * 3


def test_a_worker_that_is_full_of_one_kind_is_given_the_other(mixed):
    stage, child = mixed(async_concurrency=2)
    stage.hand_out(ASYNC, ASYNC)
    assert demand(stage) == 1
    stage.hand_out(SYNC)

    assert counts(child) == (1, 2)
    assert demand(stage) == 0


def test_work_is_wanted_as_long_as_some_kind_would_start_at_once(mixed):
    stage, child = mixed(async_concurrency=1)
    make_short(child)
    stage.hand_out(*[SYNC] * 6)
    assert demand(stage) == 0, "a sync task may be wanted any moment"
    child.progress.begin(next(iter(child.assigned)), NOW - LONG - 0.001, None, None)
    assert demand(stage) == 1, "an async task would start"
    stage.hand_out(ASYNC)

    assert demand(stage) == 0


def test_more_async_tasks_are_claimed_the_more_of_them_come(mixed):
    stage, child = mixed(async_concurrency=100)
    wanted = []
    for _ in range(5):
        wanted.append(demand(stage))
        stage.hand_out(*[ASYNC] * wanted[-1])
    assert wanted == [1, 2, 4, 8, 16]
    assert counts(child) == (0, 31)
    stage.hand_out(SYNC)
    stage.finish(child)

    assert demand(stage) == 1


def test_an_application_with_async_tasks_gets_all_the_sync_work_ahead(mixed):
    stage, child = mixed()
    make_short(child)
    assert demand(stage) == 6
    stage.hand_out(*[SYNC] * 6)

    assert counts(child) == (6, 0)
    assert stage.settled() == []


def test_after_a_kind_that_nobody_could_take_the_next_claim_in_hope_waits(mixed):
    stage, _ = mixed(async_concurrency=5)
    stage.hand_out(SYNC)
    stage.hand_out(SYNC)
    assert len(stage.requeued()) == 1
    until = stage.dispatcher._surplus_until

    assert demand(stage, until - 0.001) == 0
    assert stage.dispatcher._wait(until - 0.001) == pytest.approx(0.001)
    assert demand(stage, until) == 1


def test_a_worker_that_can_take_both_kinds_is_given_work_after_a_surplus(mixed):
    stage, child = mixed(async_concurrency=5)
    stage.hand_out(SYNC, SYNC)
    stage.finish(child)

    assert demand(stage, stage.dispatcher._surplus_until - 0.001) == 1


# -- suspects --------------------------------------------------------------------------------------


def test_a_suspect_runs_alone(stage):
    child = stage.join()
    make_short(child)
    claims = stage.hand_out(SUSPECT)
    assert child.claims == claims
    assert not prefetch.takes_work(child)
    assert demand(stage) == 0
    stage.finish(child)

    assert prefetch.takes_work(child)
    assert demand(stage) > 0


def test_a_suspect_waits_for_the_worker_with_least_to_do_which_gets_nothing_more(stage):
    more, least = stage.join(1), stage.join(2)
    make_short(more, least)
    more.have("a", "b")
    (row,) = least.have("c")
    (suspect,) = stage.hand_out(SUSPECT)
    assert (more.is_reserved, least.is_reserved) == (False, True)
    # What it has not begun may be run elsewhere.
    assert (kinds(more), kinds(least)) == ([], [Recall])
    (other,) = stage.hand_out(SYNC)
    assert more.claims[-1] is other
    stage.say(least, Recalled([]))
    stage.finish(least, row)
    stage.step()

    assert least.claims == [suspect]
    assert not least.is_reserved


def test_suspects_run_one_by_one_in_their_order(stage):
    child = stage.join()
    first, second = stage.hand_out(SUSPECT, SUSPECT)[:2]
    assert child.claims == [first]
    assert stage.settled() == []
    stage.finish(child)
    stage.step()

    assert child.claims == [second]


def test_each_suspect_is_given_a_worker_of_its_own_beside_ordinary_work(stage):
    children = [stage.join(slot) for slot in (1, 2, 3)]
    claims = stage.hand_out(SUSPECT, SUSPECT, SYNC)

    assert sorted(map(id, claims)) == sorted(id(child.claims[0]) for child in children)
    assert [child.runs_suspect for child in children].count(True) == 2


def test_more_suspects_than_workers_go_back_in_their_order(stage):
    child = stage.join()
    claims = stage.hand_out(*[SUSPECT] * 4)

    assert child.claims == claims[:1]
    # One waits, for others may have no worker that is free either.
    assert stage.requeued() == claims[2:]


def test_a_suspect_goes_back_where_no_worker_can_serve_it(stage):
    child = stage.join()
    stage.dispatcher.retire_child(child)

    assert stage.hand_out(SUSPECT) == stage.requeued()


def test_a_suspect_whose_reserved_worker_dies_gets_another(stage):
    one, other = stage.join(1), stage.join(2)
    for child in (one, other):
        child.have("a")
    (suspect,) = stage.hand_out(SUSPECT)
    reserved, free = (one, other) if one.is_reserved else (other, one)
    assert not free.is_reserved
    stage.die(reserved)
    stage.step()
    assert free.is_reserved
    stage.finish(free)
    stage.step()

    assert free.claims == [suspect]


def test_a_worker_is_not_kept_for_a_suspect_that_another_has_taken(stage):
    one, other = stage.join(1), stage.join(2)
    for child in (one, other):
        child.have("a")
    stage.hand_out(SUSPECT)
    (reserved,) = [child for child in (one, other) if child.is_reserved]
    stage.dispatcher._suspects.clear()
    stage.step()

    assert not reserved.is_reserved


def test_an_async_suspect_runs_alone_too(mixed):
    stage, child = mixed()
    claims = stage.hand_out(ASYNC_SUSPECT)

    assert counts(child) == (0, 1)
    assert child.claims == claims
    assert demand(stage) == 0


def test_async_tasks_end_before_a_suspect_runs(mixed):
    stage, child = mixed()
    stage.hand_out(ASYNC)
    (row,) = child.assigned
    (suspect,) = stage.hand_out(SUSPECT)
    assert suspect not in child.claims
    stage.finish(child, row)
    stage.step()

    assert child.claims == [suspect]


def test_a_worker_whose_last_task_that_was_runs_no_suspect(make_stage):
    stage = make_stage(max_tasks_per_worker=1)
    child = stage.join()
    stage.hand_out(SYNC)
    claims = stage.hand_out(SUSPECT)

    assert stage.requeued() == claims
    assert not child.is_reserved


# -- broadcasts ------------------------------------------------------------------------------------


@pytest.fixture
def broadcast(stage):
    def broadcast(*payloads, on=stage):
        for payload in payloads:
            on.dispatcher.broadcast(payload)
        on.step()

    return broadcast


def broadcasts(child):
    """Return the broadcasts that a worker was sent since the last call."""
    frames = [frame for frame in heard(child) if isinstance(frame, Assign)]
    return [frame.payloads for frame in frames if frame.queue == -1]


def test_a_broadcast_goes_to_an_idle_worker_as_urgent(stage, broadcast):
    busy, idle = stage.join(1), stage.join(2)
    busy.have("a")
    broadcast(SYNC)

    assert heard(busy) == []
    assert heard(idle) == [Assign("", -1, list(idle.assigned), [0], [SYNC], is_urgent=True)]


def test_where_all_are_busy_the_first_to_be_free_gets_it_once(stage, broadcast):
    one, two = stage.join(1), stage.join(2)
    rows = [*one.have("a"), *two.have("b")]
    broadcast(SYNC)
    assert broadcasts(one) == broadcasts(two) == []
    stage.finish(two, rows[1])
    stage.finish(one, rows[0])
    stage.step()

    assert (broadcasts(one), broadcasts(two)) == ([], [[SYNC]])


def test_a_task_that_failed_leaves_its_worker_free_for_a_broadcast_as_well(stage, broadcast):
    child = stage.join()
    (row,) = child.have("a")
    broadcast(SYNC)
    stage.say(child, Outcome.of(row, Settlement(Action.DEAD, b"letter")))

    assert broadcasts(child) == [[SYNC]]


def test_several_broadcasts_go_one_to_each_idle_worker_in_their_order(stage, broadcast):
    children = [stage.join(slot) for slot in (1, 2)]
    broadcast(b"1", b"2", b"3")
    given = [broadcasts(child) for child in children]
    assert sorted(given) == [[[b"1"]], [[b"2"]]]
    stage.finish(children[0])

    assert broadcasts(children[0]) == [[b"3"]]
    assert broadcasts(children[1]) == []


def test_an_async_broadcast_goes_to_a_busy_worker_too_past_a_sync_one_that_waits(mixed, broadcast):
    stage, child = mixed()
    (row,) = child.have("sync")
    broadcast(SYNC, ASYNC, on=stage)
    assert broadcasts(child) == [[ASYNC]]
    assert counts(child) == (1, 1)
    stage.finish(child, row)

    assert broadcasts(child) == [[SYNC]]


def test_no_broadcast_goes_to_a_worker_that_does_not_serve(stage, broadcast):
    child = stage.join(is_ready=False)
    broadcast(SYNC)
    assert heard(child) == []
    stage.say(child, Ready())
    stage.step()

    assert broadcasts(child) == [[SYNC]]


def test_broadcasts_wait_where_no_worker_has_room_for_them(mixed, broadcast):
    stage, child = mixed(async_concurrency=3)
    broadcast(*[ASYNC] * 10, on=stage)
    assert broadcasts(child) == [[ASYNC]] * 3
    stage.finish(child, next(iter(child.async_rows)))

    assert broadcasts(child) == [[ASYNC]]


def settle_broadcast(stage, child, settlement):
    """Have a worker report its broadcast."""
    (row,) = child.assigned
    stage.say(child, Outcome.of(row, settlement))
    stage.step()


@pytest.mark.parametrize(
    ("action", "payload", "again"),
    [
        (Action.REQUEUE, b"", SYNC),
        (Action.RETRY, b"new", b"new"),
        (Action.DELAY, b"new", b"new"),
        (Action.REDELIVER, SUSPECT, SUSPECT),
        (Action.DEAD, b"letter", None),
    ],
)
def test_a_broadcast_is_settled_here(stage, broadcast, action, payload, again):
    child = stage.join()
    broadcast(SYNC)
    assert broadcasts(child) == [[SYNC]]
    settle_broadcast(stage, child, Settlement(action, payload))
    stage.step()

    assert broadcasts(child) == ([[again]] if again else [])
    assert stage.settled() == []


def test_a_broadcast_that_was_run_is_forgotten(stage, broadcast):
    child = stage.join()
    broadcast(SYNC)
    stage.finish(child)
    stage.step()

    assert broadcasts(child) == [[SYNC]]
    assert stage.settled() == []


def test_a_delayed_broadcast_waits_for_its_time(stage, broadcast):
    child = stage.join()
    broadcast(SYNC)
    settle_broadcast(stage, child, Settlement(Action.DELAY, b"new", 1_000.0))
    assert broadcasts(child) == [[SYNC]]
    ((due, _),) = stage.dispatcher._broadcasts
    assert stage.dispatcher._wait(due - 0.25) == pytest.approx(0.25)
    stage.dispatcher._start_broadcasts(due - 0.01)
    assert broadcasts(child) == []
    stage.dispatcher._broadcasts[:] = [(0.0, stage.dispatcher._broadcasts[0][1])]
    stage.step()

    assert broadcasts(child) == [[b"new"]]


def test_a_broadcast_that_is_given_up_is_named_in_the_log(stage, broadcast, caplog):
    child = stage.join()
    broadcast(SYNC)
    settle_broadcast(stage, child, Settlement(Action.DEAD, b"letter"))

    assert "Broadcast sync() is given up, and leaves no dead letter" in caplog.text


def test_a_broadcast_whose_worker_died_before_it_began_runs_in_another(stage, broadcast):
    first, second = stage.join(1), stage.join(2)
    broadcast(SYNC)
    dead, living = (first, second) if first.assigned else (second, first)
    stage.die(dead)
    stage.step()

    assert broadcasts(living) == [[SYNC]]


def test_a_broadcast_that_has_taken_down_its_only_worker_runs_alone_in_the_next(stage, broadcast):
    child = stage.join()
    broadcast(SYNC)
    (row,) = child.assigned
    child.progress.states[row] = STARTED
    stage.die(child)
    stage.step()
    successor = stage.join(is_ready=False)
    for _ in range(3):
        stage.step()
    stage.say(successor, Ready())
    stage.step()
    stage.step()

    (payload,) = (claim.payload for claim in successor.claims)
    assert b'"redelivered": 1' in payload
    assert demand(stage) == 0


# -- shutdown --------------------------------------------------------------------------------------


def test_a_drain_retires_all_workers_also_one_that_joins_later(stage):
    busy, idle = stage.join(1), stage.join(2)
    busy.have("a")
    stage.dispatcher.drain()
    late = stage.join(3, is_ready=False)

    assert (kinds(busy), kinds(idle), kinds(late)) == ([Recall], [Recall, Stop], [Recall, Stop])
    assert demand(stage) == 0


def test_what_was_claimed_before_a_drain_goes_back(stage):
    child = stage.join()
    child.have("a")
    (suspect,) = stage.hand_out(SUSPECT)
    assert stage.settled() == []
    stage.dispatcher.drain()
    (late,) = stage.hand_out(SYNC)

    assert stage.requeued() == [suspect, late]
