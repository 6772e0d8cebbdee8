"""What the dispatcher asks of Redis, and when: its own steps, on a real server, for a worker that the tests play."""

import os
import time
from types import SimpleNamespace

import pytest

from wakaq import WakaQ
from wakaq.broker import Broker
from wakaq.frames import Done, Ready, Recalled
from wakaq.supervisor.child import LONG
from wakaq.supervisor.dispatcher import Dispatcher
from wakaq.service import Outage
from wakaq.turn import Claim

HIGH, LOW, STATS = "wakaq:high", "wakaq:low", "wakaq:stats:low"
ARRIVALS, LANE = "wakaq:inflight:low:me:0", "wakaq:inflight:low:me:1"


class Lease:
    """The lease of a supervisor that others may have declared dead; `names` are the ids that it will have."""

    lost = None
    is_held = True

    def __init__(self, broker, *names):
        self.worker_id = ""
        self._broker = broker
        self._names = list(names)

    def register(self):
        self.worker_id = self._names.pop(0)
        self._broker.register(self.worker_id, {})
        return self.worker_id

    def is_fresh(self):
        return self.is_held


@pytest.fixture
def broker(app_url):
    app = WakaQ(queues=[(0, "high"), (1, "low")], url=app_url, wait_timeout=0.3)
    broker = Broker(app.settings, app.queues)
    yield SimpleNamespace(app=app, real=broker)
    broker.close()


@pytest.fixture
def lease(broker):
    return Lease(broker.real, "me", "new")


@pytest.fixture
def dispatcher(broker, lease):
    dispatcher = Dispatcher(broker.app, broker.real, Outage(), lease, lambda _: None)
    dispatcher.claimer.ledger.rename(lease.register())
    yield dispatcher
    for watcher in dispatcher.claimer._watchers._watchers:
        watcher.wire.close()
    dispatcher._selector.close()
    os.close(dispatcher._mailbox._reader)
    os.close(dispatcher._mailbox._writer)


@pytest.fixture
def worker(dispatcher, make_child):
    """The worker with number 1, which is ready."""
    child = make_child()
    dispatcher.join_child(child)
    child.theirs.send(Ready())
    dispatcher._step()
    return child


def step_until(dispatcher, is_true, within=5.0):
    deadline = time.monotonic() + within
    while not is_true():
        assert time.monotonic() < deadline, "it did not happen"
        dispatcher._step()


def had(child):
    return [claim.payload for claim in child.assigned.values()]


def finish(dispatcher, child):
    """Have a worker report all that it has as done, and the dispatcher hear it and tell Redis."""
    slots, claims = list(child.assigned), list(child.assigned.values())
    child.theirs.send(Done(slots, len(slots), 4 * LONG * len(slots)))
    step_until(
        dispatcher,
        lambda: (
            not any(claim is one for claim in claims for one in child.assigned.values())
            and dispatcher.claimer.ledger.is_settled
        ),
    )


def watches(dispatcher):
    return dispatcher.claimer._watchers.is_waiting


# -- an ordinary life ------------------------------------------------------------------------------


def test_what_waits_is_claimed_by_a_turn_and_what_arrives_by_a_watcher(dispatcher, worker, redis):
    redis.rpush(LOW, "a")
    redis.rpush(HIGH, "b")
    step_until(dispatcher, lambda: worker.assigned)
    assert had(worker) in ([b"b"], [b"a"])  # a watcher may have been faster
    finish(dispatcher, worker)
    step_until(dispatcher, lambda: worker.assigned)
    finish(dispatcher, worker)
    step_until(dispatcher, lambda: watches(dispatcher))
    redis.rpush(LOW, "c")
    step_until(dispatcher, lambda: worker.assigned)

    assert had(worker) == [b"c"]
    assert redis.lrange(ARRIVALS, 0, -1) == [b"c"]
    finish(dispatcher, worker)
    assert redis.keys("wakaq:inflight:*") == []
    assert redis.hgetall(STATS) == {b"done": b"2"}


def test_what_follows_a_task_whose_end_is_expected_is_claimed_just_before_it(
    dispatcher, worker, redis
):
    redis.rpush(LOW, *"abcde")
    for _ in range(2):
        step_until(dispatcher, lambda: worker.assigned)
        finish(dispatcher, worker)
    assert had(worker) == [b"c"]
    running = next(iter(worker.assigned))
    worker.progress.begin(running, time.monotonic(), None, None)
    step_until(dispatcher, lambda: len(worker.assigned) > 1)

    assert time.monotonic() >= worker.next_at(dispatcher._crew.round_trip)
    assert had(worker) == [b"c", b"d"]
    # It does not end; so what waits is asked back, and nothing is claimed in its stead.
    step_until(dispatcher, lambda: worker.is_recalling)
    worker.theirs.send(Recalled([slot for slot in worker.assigned if slot != running]))
    step_until(dispatcher, lambda: redis.lrange(LOW, 0, -1) == [b"d", b"e"])
    assert had(worker) == [b"c"]
    assert dispatcher.claimer.next_step_at(0.0) > 0.0  # that is, not at once


def test_connections_that_the_server_closes_while_nobody_waits_on_them_are_made_anew(
    dispatcher, worker, redis, caplog
):
    step_until(dispatcher, lambda: watches(dispatcher))
    redis.rpush(LOW, "a")
    # The other queue's watcher comes to its end, and does not go on, since no worker is idle.
    step_until(dispatcher, lambda: worker.assigned and not watches(dispatcher))
    sockets = [watcher.sock for watcher in dispatcher.claimer._watchers._watchers]
    assert None not in sockets
    redis.client_kill_filter(_type="normal", skipme=True)
    known = dispatcher._selector.get_map()
    step_until(
        dispatcher, lambda: len(known) == 2
    )  # the mailbox and the worker: nothing to spin on

    finish(dispatcher, worker)
    step_until(dispatcher, lambda: watches(dispatcher))
    redis.rpush(LOW, "b")
    step_until(dispatcher, lambda: had(worker) == [b"b"])
    assert caplog.messages == []  # it is no outage


def test_what_nobody_can_take_goes_back_to_the_front_in_its_order(dispatcher, worker, redis):
    step_until(dispatcher, lambda: watches(dispatcher))
    dispatcher.retire_child(worker)
    redis.rpush(LOW, "later")
    redis.rpush(LANE, "a", "b")
    lane = dispatcher.claimer.ledger.lanes(1)[1]
    dispatcher.claimer.requeue([Claim(lane, b"a"), Claim(lane, b"b")])
    step_until(dispatcher, lambda: not redis.exists(LANE, ARRIVALS))

    # What the watcher had claimed meanwhile was given back, too, before or after them.
    assert sorted(redis.lrange(LOW, 0, -1)) == [b"a", b"b", b"later"]
    order = redis.lrange(LOW, 0, -1)
    assert order.index(b"a") + 1 == order.index(b"b")


def test_with_an_old_lease_nothing_is_claimed_but_what_is_done_is_told(
    dispatcher, worker, lease, redis
):
    redis.rpush(LOW, "a", "b")
    step_until(dispatcher, lambda: worker.assigned)
    lease.is_held = False
    finish(dispatcher, worker)
    assert redis.hgetall(STATS) == {b"done": b"1"}
    for _ in range(5):
        dispatcher.post(lambda: None)  # so that no step waits
        dispatcher._step()
    assert had(worker) == []
    assert redis.lrange(LOW, 0, -1) == [b"b"]
    lease.is_held = True
    step_until(dispatcher, lambda: worker.assigned)

    assert had(worker) == [b"b"]


def test_one_that_was_declared_dead_goes_on_under_a_new_name(dispatcher, worker, lease, redis):
    redis.rpush(LOW, "a")
    step_until(dispatcher, lambda: worker.assigned)
    lease.lost = "me"
    finish(dispatcher, worker)
    assert dispatcher.claimer.ledger.worker_id == "new"
    redis.rpush(LOW, "b")
    step_until(dispatcher, lambda: worker.assigned)

    assert redis.keys("wakaq:inflight:low:*") in (
        [b"wakaq:inflight:low:new:0"],
        [b"wakaq:inflight:low:new:1"],
    )
    # What the old name had claimed is acked under the old name.
    assert redis.hgetall(STATS) == {b"done": b"1"}


def test_one_that_the_server_does_not_know_any_more_finds_out(dispatcher, worker, redis):
    step_until(dispatcher, lambda: watches(dispatcher))
    redis.flushall()
    dispatcher.claimer.ledger.look()
    dispatcher._step()
    redis.rpush(LOW, "a")
    step_until(dispatcher, lambda: worker.assigned)

    assert dispatcher.claimer.ledger.worker_id == "new"
    assert redis.hgetall("wakaq:registry:workers") == {b"new": b"{}"}


def test_a_drain_claims_nothing_more_and_ends_when_all_is_settled(dispatcher, worker, redis):
    redis.rpush(LOW, "a")
    step_until(dispatcher, lambda: worker.assigned)
    dispatcher.drain()
    redis.rpush(LOW, "b")
    redis.rpush(ARRIVALS, "claimed unseen")
    finish(dispatcher, worker)
    worker.theirs.close()
    step_until(dispatcher, lambda: worker.is_gone)
    assert not dispatcher._is_finished()
    dispatcher.finish(time.monotonic() + 60.0)
    step_until(dispatcher, dispatcher._is_finished)

    assert sorted(redis.lrange(LOW, 0, -1)) == [b"b", b"claimed unseen"]
    assert redis.keys("wakaq:inflight:*") == []
    assert not dispatcher.claimer.is_haunted()


# -- calls that were cut off -----------------------------------------------------------------------


@pytest.fixture
def haunted(dispatcher, worker, redis):
    """A dispatcher whose lanes were compared after an outage, and whose watchers wait; then a cut call was executed."""
    ledger = dispatcher.claimer.ledger
    ledger.doubt(time.monotonic())
    step_until(dispatcher, lambda: not ledger.is_in_doubt and watches(dispatcher))
    assert worker.is_idle
    redis.rpush(ARRIVALS, "stray")
    return dispatcher


def test_what_was_claimed_unseen_is_found_as_soon_as_a_watcher_comes_back_empty(haunted, worker):
    step_until(haunted, lambda: worker.assigned)

    assert had(worker) == [b"stray"]


def test_long_after_an_outage_empty_answers_are_no_reason_to_look(haunted, worker, redis):
    ledger = haunted.claimer.ledger
    ledger._haunted_until = 0.0
    before = ledger.compare_at
    for _ in range(4):
        step_until(haunted, lambda: watches(haunted))
        haunted._step()

    assert ledger.compare_at == before
    assert had(worker) == []
    assert redis.lrange(ARRIVALS, 0, -1) == [b"stray"]


def test_while_a_cut_call_may_come_lanes_are_not_compared_before_nobody_waits_for_them(
    haunted, worker
):
    ledger = haunted.claimer.ledger
    due = ledger.compare_at = time.monotonic()
    haunted.post(lambda: None)  # so that the step does not wait
    haunted._step()

    # Else it would look only into lanes without a watcher, and with a trickle of work there is always one.
    assert ledger.compare_at == due
    step_until(haunted, lambda: worker.assigned)
    assert had(worker) == [b"stray"]
    assert ledger.compare_at > due + 1
