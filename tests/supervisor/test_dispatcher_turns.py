"""What the dispatcher asks of Redis, and when: its steps, for workers that the test plays."""

import contextlib
import json
import os
import time

import pytest

from wakaq import Queue, WakaQ
from wakaq.channel import Adopted, Assign, Outcome, Recalled, Stop
from wakaq.store.registry import Registry
from wakaq.store.settlement import Action, Settlement
from wakaq.supervisor import dispatcher as dispatcher_module
from wakaq.supervisor.dispatcher import ASKED_FOR, Group

HIGH, LOW, HEAD, STATS = "wakaq:high", "wakaq:low", "wakaq:head:low", "wakaq:stats:low"
ENTRIES, TURNS = "wakaq:registry:workers", "wakaq:registry:turns"


@pytest.fixture
def live(make_stage, app_url):
    """A stage that is registered, and whose senders and wakers run."""
    stage = make_stage(url=app_url, wait_timeout=0.1)
    stage.start()
    return stage


@pytest.fixture
def worker(live):
    return live.join()


def had(child):
    return [claim.payload for claim in child.claims]


def inflight(stage, redis, name="low"):
    """Return what Redis has in flight under the supervisor's present id."""
    found = redis.hgetall(f"wakaq:inflight:{name}:{stage.group.inflight.supervisor_id}")
    return {int(number): payload for number, payload in found.items()}


def is_idle(stage):
    return stage.group.idleness.is_idle.is_set()


def is_settled(stage):
    return stage.group.inflight.is_settled


# -- claims ----------------------------------------------------------------------------------------


def test_what_waits_is_claimed_by_priority_and_settled_by_the_next_turn(live, worker, redis):
    redis.rpush(LOW, "a")
    redis.rpush(HIGH, "b")
    live.step_until(lambda: worker.assigned)
    assert had(worker) == [b"b"]
    assert inflight(live, redis, "high") == {worker.claims[0].number: b"b"}
    live.finish(worker)
    live.step_until(lambda: worker.assigned)
    assert had(worker) == [b"a"]
    live.finish(worker)
    live.step_until(lambda: is_settled(live))

    assert redis.keys("wakaq:inflight:*") == []
    assert redis.hgetall(STATS) == {b"done": b"1"}


def test_work_that_arrives_wakes_an_idle_machine(live, worker, redis, monkeypatch):
    monkeypatch.setattr(dispatcher_module, "BEAT", 60.0)
    live.step_until(lambda: is_idle(live))
    redis.rpush(LOW, "a")
    live.step_until(lambda: worker.assigned)

    assert had(worker) == [b"a"]
    assert redis.exists(LOW, HEAD) == 0


def test_nobody_waits_for_work_where_no_worker_has_room(live, worker, redis):
    live.step_until(lambda: is_idle(live))
    redis.rpush(LOW, "a")
    live.step_until(lambda: worker.assigned)
    live.step()
    assert not is_idle(live)
    assert not live.group.idleness.has_room
    redis.rpush(LOW, "b")
    live.finish(worker)
    live.step_until(lambda: worker.assigned)

    assert had(worker) == [b"b"]


def test_an_idle_supervisor_makes_a_turn_every_so_often(live, redis, monkeypatch):
    monkeypatch.setattr(dispatcher_module, "BEAT", 0.05)
    before = live.group.inflight.turn_number
    live.step_until(lambda: live.group.inflight.turn_number >= before + 3)

    (state,) = redis.hvals(TURNS)
    assert int(state.split()[0]) >= before + 3


def test_what_is_finished_is_told_soon_although_nothing_is_wanted(live, worker, redis, monkeypatch):
    monkeypatch.setattr(dispatcher_module, "BEAT", 60.0)
    redis.rpush(LOW, "a")
    live.step_until(lambda: worker.assigned)
    live.dispatcher.retire_child(worker)
    live.finish(worker)
    live.step_until(lambda: is_settled(live))

    assert redis.hgetall(STATS) == {b"done": b"1"}


def test_what_nobody_can_take_goes_back_to_the_front_in_its_order(live, redis):
    children = [live.join(slot) for slot in (1, 2)]
    live.step_until(lambda: is_idle(live))
    for child in children:
        child.window, child.average = 8, 0.001
    live.step()
    redis.rpush(LOW, *"abcdef")
    # It is claimed; and before the answer is taken in, the workers are to retire.
    live.group.sender.wake()
    wait_until(lambda: not live.dispatcher._mailbox.is_empty())
    for child in children:
        live.dispatcher.retire_child(child)
    live.step_until(lambda: not is_settled(live))
    live.step_until(lambda: is_settled(live))

    assert redis.lrange(LOW, 0, -1) == [b"a", b"b", b"c", b"d", b"e", b"f"]
    assert [had(child) for child in children] == [[], []]


def wait_until(is_true, within=5.0):
    deadline = time.monotonic() + within
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_what_redis_refuses_to_settle_is_tried_again_and_holds_up_nothing_else(
    live, worker, redis, monkeypatch, caplog
):
    monkeypatch.setattr(dispatcher_module, "RETRY_REFUSED", 0.05)
    redis.set("wakaq:dead:low", "no list")
    redis.rpush(LOW, "a", "b")
    live.step_until(lambda: worker.assigned)
    (row,) = worker.assigned
    live.say(worker, Outcome.of(row, Settlement(Action.DEAD, b"letter")))
    live.step_until(lambda: worker.assigned)
    live.finish(worker)
    live.step_until(lambda: redis.hgetall(STATS) == {b"done": b"1"})
    assert list(inflight(live, redis).values()) == [b"a"]
    redis.delete("wakaq:dead:low")
    live.step_until(lambda: is_settled(live))

    assert redis.lrange("wakaq:dead:low", 0, -1) == [b"letter"]
    assert caplog.text.count("wakaq:dead:low: WRONGTYPE") == 1


# -- eviction --------------------------------------------------------------------------------------


def test_one_that_was_declared_dead_goes_on_under_a_new_id_with_what_it_holds(
    live, worker, redis, caplog
):
    redis.rpush(LOW, "a")
    live.step_until(lambda: worker.assigned)
    assert isinstance(worker.theirs.receive()[0], Assign)
    old = live.group.inflight.supervisor_id
    # A claim whose answer was lost for good, say: nobody runs it.
    redis.hset(f"wakaq:inflight:low:{old}", 99, "unknown")
    redis.hdel(TURNS, old)
    live.step_until(lambda: live.group.inflight.supervisor_id != old)
    live.step_until(lambda: live.group.next_step is None and inflight(live, redis))

    new = live.group.inflight.supervisor_id
    (claim,) = worker.claims
    assert redis.keys("wakaq:inflight:*") == [f"wakaq:inflight:low:{new}".encode()]
    assert inflight(live, redis) == {claim.number: b"a"}
    assert redis.lrange(LOW, 0, -1) == [b"unknown"]
    assert redis.hkeys(TURNS) == redis.hkeys(ENTRIES) == [new.encode()]
    # Should we die, its worker must find it.
    (told,) = worker.theirs.receive()
    assert told == Adopted(new, list(worker.assigned), [claim.number])
    assert caplog.text.count("Declared dead by another supervisor, or Redis lost its data") == 1
    live.finish(worker)
    live.step_until(lambda: redis.hgetall(STATS) == {b"done": b"1"})
    live.step_until(lambda: had(worker) == [b"unknown"])


def test_what_others_have_rescued_meanwhile_is_run_to_its_end_and_not_settled(live, redis):
    worker = live.join()
    redis.rpush(LOW, "a")
    live.step_until(lambda: worker.assigned)
    old = live.group.inflight.supervisor_id
    redis.delete(f"wakaq:inflight:low:{old}")
    redis.hdel(TURNS, old)
    live.step_until(lambda: live.group.inflight.supervisor_id != old)
    live.step_until(lambda: live.group.next_step is None)
    assert had(worker) == [b"a"]
    redis.rpush(LOW, "b")
    live.finish(worker)
    live.step_until(lambda: had(worker) == [b"b"])

    assert redis.hgetall(STATS) == {}


def test_one_that_the_server_has_forgotten_registers_anew(live, worker, redis, monkeypatch):
    monkeypatch.setattr(dispatcher_module, "BEAT", 0.05)
    old = live.group.inflight.supervisor_id
    redis.flushall()
    live.step_until(lambda: live.group.inflight.supervisor_id != old)
    redis.rpush(LOW, "a")
    live.step_until(lambda: worker.assigned)

    new = live.group.inflight.supervisor_id.encode()
    assert redis.hkeys(TURNS) == redis.hkeys(ENTRIES) == [new]
    entry = json.loads(redis.hget(ENTRIES, new))
    assert (entry["pid"], entry["queues"]) == (os.getpid(), ["high", "low"])


def test_what_others_have_rescued_before_it_began_is_asked_back_and_forgotten(live, worker, redis):
    worker.window, worker.average = 8, 0.001
    redis.rpush(LOW, *"abc")
    live.step_until(lambda: len(worker.assigned) == 3)
    worker.progress.begin(next(iter(worker.assigned)), time.monotonic(), None, None)
    old = live.group.inflight.supervisor_id
    number = worker.claims[1].number
    redis.hdel(f"wakaq:inflight:low:{old}", number)
    redis.hdel(TURNS, old)
    live.step_until(lambda: worker.is_recalling)
    live.say(worker, Recalled(list(worker.assigned)[1:]))
    live.step_until(lambda: redis.lrange(LOW, 0, -1) == [b"c"])

    assert had(worker) == [b"a"]
    assert list(inflight(live, redis).values()) == [b"a"]


def test_a_server_that_evicts_again_and_again_is_asked_ever_more_slowly(live):
    group, now, pauses = live.group, 1_000.0, []
    for _ in range(4):
        live.dispatcher._note_eviction(group, now)
        pauses.append(group.next_step_at - now)
    assert pauses[0] == 0.0
    assert 0.0 < pauses[1] < pauses[3]
    live.step_until(lambda: group.evictions == 0)
    live.dispatcher._note_eviction(group, now)

    assert group.next_step_at == now


@pytest.mark.parametrize("is_rescued", [False, True])
def test_a_suspect_that_waits_here_runs_unless_others_have_rescued_it(
    live, worker, redis, is_rescued
):
    suspect = b'{"name": "sync", "redelivered": 1}'
    redis.rpush(LOW, "a")
    live.step_until(lambda: worker.assigned)
    worker.window, worker.average = 8, 0.001
    redis.rpush(LOW, suspect)
    live.step_until(lambda: worker.is_reserved)
    old = live.group.inflight.supervisor_id
    (number,) = (number for number, one in inflight(live, redis).items() if one == suspect)
    if is_rescued:
        redis.hdel(f"wakaq:inflight:low:{old}", number)
    redis.hdel(TURNS, old)
    live.step_until(lambda: live.group.inflight.supervisor_id != old)
    live.step_until(lambda: live.group.next_step is None)
    live.finish(worker)
    live.step()

    assert had(worker) == ([] if is_rescued else [suspect])
    assert not worker.is_reserved


# -- outages ---------------------------------------------------------------------------------------


def test_what_workers_report_while_redis_is_away_waits_and_nothing_is_doubled(
    make_stage, make_server, frozen, caplog
):
    server = make_server()
    stage = make_stage(url=server.url, wait_timeout=0.1, socket_timeout=0.2)
    stage.start()
    worker = stage.join()
    with contextlib.closing(server.client()) as redis:
        redis.rpush(LOW, "a", "b")
        stage.step_until(lambda: worker.assigned)
        with frozen(server):
            stage.finish(worker)
            stage.step_until(lambda: "Redis is away" in caplog.text)
            stage.step()
            assert stage.group.inflight.to_settle == 1
        stage.step_until(lambda: worker.assigned)
        assert had(worker) == [b"b"]
        stage.finish(worker)
        stage.step_until(lambda: is_settled(stage))

        assert redis.hgetall(STATS) == {b"done": b"2"}
        assert redis.keys("wakaq:inflight:*") == []


# -- slot groups -----------------------------------------------------------------------------------


@pytest.fixture
def groups(make_stage, make_server):
    """A stage with two slot groups on two servers, and these servers; `left` is served first."""
    servers = [make_server(), make_server()]
    queues = [Queue("left", 0), Queue("right", 1)]
    options = {"wait_timeout": 0.1, "socket_timeout": 5.0}
    stage = make_stage(queues=queues, url=servers[0].url, **options)
    dispatcher = stage.dispatcher
    with contextlib.ExitStack() as stack:
        dispatcher.groups = []
        for server, queue in zip(servers, queues, strict=True):
            app = WakaQ(queues=[queue], url=server.url, **options)
            stack.callback(app.broker.close)
            (slots,) = app.broker.keys.groups([queue])
            registry = Registry(app.broker, slots)
            group = Group(app, registry, stage.outage, dispatcher._post_answer)
            group.inflight.begin(group.registration().send(app.broker))
            dispatcher.groups.append(group)
            dispatcher._group_of[queue] = group
        stage.group = dispatcher.groups[0]
        stage.start_threads()
        yield stage, servers
        stage.stop()


def test_a_group_whose_server_is_frozen_holds_up_no_other(groups, frozen):
    stage, servers = groups
    left, right = stage.dispatcher.groups
    one, other = stage.join(1), stage.join(2)
    with contextlib.ExitStack() as stack:
        redis, away = (stack.enter_context(contextlib.closing(s.client())) for s in servers)
        away.rpush("wakaq:right", "a")
        stage.step_until(lambda: one.assigned or other.assigned)
        holder = one if one.assigned else other
        with frozen(servers[1]):
            # A turn is under way there that will not be answered for long: the settlement waits.
            stage.step_until(lambda: not right.sender.is_open)
            stage.finish(holder)
            for number in range(5):
                redis.rpush("wakaq:left", f"{number}")
                stage.step_until(lambda: one.assigned or other.assigned, within=2.0)
                for child in (one, other):
                    if child.assigned:
                        assert had(child) == [f"{number}".encode()]
                        stage.finish(child)
            stage.step_until(lambda: left.inflight.is_settled, within=2.0)
            assert redis.hgetall("wakaq:stats:left") == {b"done": b"5"}
            assert right.inflight.to_settle == 1
        stage.step_until(lambda: right.inflight.is_settled)

        assert away.hgetall("wakaq:stats:right") == {b"done": b"1"}


def test_groups_are_registered_and_leave_each_on_its_own_server(groups):
    stage, servers = groups
    ids = [group.inflight.supervisor_id for group in stage.dispatcher.groups]
    assert len(set(ids)) == 2
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(contextlib.closing(s.client())) for s in servers]
        assert [client.hkeys(TURNS) for client in clients] == [[one.encode()] for one in ids]
        stage.dispatcher.drain()
        stage.dispatcher.finish(time.monotonic() + 60.0)
        stage.step_until(stage.dispatcher._is_finished)

        assert [client.hkeys(TURNS) for client in clients] == [[], []]


def test_what_one_group_was_asked_for_is_not_asked_of_others_for_a_while(groups):
    stage, _ = groups
    left, right = stage.dispatcher.groups
    for slot in (1, 2, 3):
        stage.join(slot)
    now = time.monotonic()
    left.asked, left.asked_until = 2, now + ASKED_FOR

    assert stage.dispatcher._demand(right, now) == 1
    assert stage.dispatcher._demand(left, now) == 3
    assert stage.dispatcher._demand(right, now + ASKED_FOR) == 3


# -- the end ---------------------------------------------------------------------------------------


def test_a_drain_claims_nothing_more_and_ends_when_all_is_settled(live, worker, redis):
    redis.rpush(LOW, "a")
    live.step_until(lambda: worker.assigned)
    live.dispatcher.drain()
    redis.rpush(LOW, "b")
    live.finish(worker)
    assert isinstance(worker.theirs.receive()[-1], Stop)
    live.die(worker)
    live.step()
    assert not live.dispatcher._is_finished()
    live.dispatcher.finish(time.monotonic() + 60.0)
    live.step_until(live.dispatcher._is_finished)

    assert redis.lrange(LOW, 0, -1) == [b"b"]
    assert redis.hgetall(STATS) == {b"done": b"1"}
    assert redis.exists(TURNS, ENTRIES) == 0


def test_what_a_wake_up_has_moved_is_back_in_the_queue_when_a_supervisor_has_left(live, redis):
    redis.rpush(LOW, "b")
    redis.rpush(HEAD, "a")
    live.dispatcher.drain()
    live.dispatcher.finish(time.monotonic() + 60.0)
    live.step_until(live.dispatcher._is_finished)

    assert redis.lrange(LOW, 0, -1) == [b"a", b"b"]


def test_a_supervisor_that_cannot_settle_ends_by_the_deadline(live, worker, redis):
    redis.rpush(LOW, "a")
    live.step_until(lambda: worker.assigned)
    live.dispatcher.drain()
    live.dispatcher.finish(time.monotonic() + 0.1)
    live.step_until(live.dispatcher._is_finished)

    assert not live.group.has_left
    assert inflight(live, redis) == {worker.claims[0].number: b"a"}


def test_the_thread_runs_until_it_has_left(make_stage, app_url, redis):
    stage = make_stage(url=app_url, wait_timeout=0.1)
    dispatcher = stage.dispatcher
    dispatcher.register()
    dispatcher.start()
    child = stage.make_child(1)
    dispatcher.post(dispatcher.join_child, child)
    redis.rpush(LOW, "a")
    wait_until(lambda: child.assigned)
    dispatcher.post(dispatcher.drain)
    dispatcher.post(stage.finish, child)
    dispatcher.post(dispatcher.end_child, child)
    dispatcher.post(dispatcher.finish, time.monotonic() + 60.0)
    dispatcher.join(10)

    assert not dispatcher.is_alive()
    assert redis.hgetall(STATS) == {b"done": b"1"}
    assert redis.exists(TURNS, ENTRIES) == 0
    for thread in (stage.group.sender, *dispatcher.wakers):
        thread.join(10)
        assert not thread.is_alive()
