"""Who is declared dead, and what becomes of what it had: a lease's ticks, at times of ours."""

import contextlib
import json
import multiprocessing
import os
import socket
import subprocess

import pytest
import redis as redis_py

from wakaq.message import Message
from wakaq.service import QUIET
from wakaq.store import keys
from wakaq.store.registry import Registry, host_identity
from wakaq.supervisor.lease import (
    ADOPTED_WITHIN,
    BEAT,
    PAGE,
    TERM,
    Identity,
    Lease,
    _Observed,
    _Other,
)

HIGH, LOW = "wakaq:high", "wakaq:low"
ENTRIES, TURNS = "wakaq:registry:workers", "wakaq:registry:turns"
NEVER_A_PID = 2**31 - 1  # above the kernel's limit, but a number


# -- what is known of another ----------------------------------------------------------------------


def test_time_counts_while_a_proof_of_life_does_not_change():
    seen = _Observed("1").then("1", is_gone=False, passed=3.0).then("1", is_gone=False, passed=4.0)

    assert seen == _Observed("1", still=7.0)
    assert seen.then("2", is_gone=False, passed=3.0) == _Observed("2")


def test_time_counts_since_a_process_was_seen_to_be_gone():
    seen = _Observed("1").then("1", is_gone=True, passed=3.0)
    assert seen == _Observed("1", still=3.0, gone=0.0)
    seen = seen.then("2", is_gone=True, passed=1.0)
    assert seen == _Observed("2", gone=1.0)

    assert seen.then("2", is_gone=False, passed=1.0) == _Observed("2", still=1.0)


# -- fixtures --------------------------------------------------------------------------------------


@pytest.fixture
def registry(redis_app):
    return Registry(redis_app.broker, redis_app.broker.groups[0])


class Me:
    """This supervisor, as the dispatcher tells of it, and its lease."""

    def __init__(self, app, registry, outage, supervisor_id):
        self.registry = registry
        self.supervisor_id = supervisor_id
        self.former_id = ""
        self.turn_number = 0
        self.error = None
        self.now = 1_000.0
        self.lease = Lease(app, self.identities, lambda: [{"pid": 7}], outage)
        self.announce()

    def announce(self):
        entry = self.registry.new_entry(self.supervisor_id, 0, 2)
        self.registry._broker.register(self.registry.group, self.supervisor_id, entry)

    def identities(self):
        if self.error:
            raise self.error
        return [Identity(self.registry, self.supervisor_id, self.former_id, self.turn_number)]

    def look(self, seconds=0.0, every=BEAT):
        """Look at once, and then again and again for so many seconds; returns the next interval."""
        end = self.now + seconds
        wait = self.lease.tick(self.now)
        while self.now < end:
            self.now = min(self.now + every, end)
            wait = self.lease.tick(self.now)
        return wait


@pytest.fixture
def make_me(redis_app, registry, outage, redis):  # noqa: ARG001 - it empties the server
    with contextlib.ExitStack() as stack:

        def make(supervisor_id):
            me = Me(redis_app, registry, outage, supervisor_id)
            stack.callback(me.lease._broker.close)
            return me

        yield make


@pytest.fixture
def me(make_me):
    return make_me("me")


@pytest.fixture
def other(registry, redis):
    """Register another supervisor, on another host, which has these calls in flight."""

    def other(supervisor_id="other", low=(), high=(), turn="3 9", **fields):
        entry = (
            registry.new_entry(supervisor_id, 3, 2) | {"same_host": "another", "pid": 1} | fields
        )
        redis.hset(ENTRIES, supervisor_id, json.dumps(entry))
        if turn:
            redis.hset(TURNS, supervisor_id, turn)
        for queue, calls in (("low", low), ("high", high)):
            for number, call in enumerate(calls, 1):
                redis.hset(f"wakaq:inflight:{queue}:{supervisor_id}", number, payload(call))
        return supervisor_id

    return other


def payload(name, **counts):
    return Message(name, [], {}, **counts).encode()


def waiting(redis, key=LOW):
    """Return the calls that wait in a queue, each with how often it was redelivered."""
    messages = map(Message.decode, redis.lrange(key, 0, -1))
    return [(message.name, message.redelivered) for message in messages]


def registered(redis):
    return {key.decode() for key in redis.hkeys(ENTRIES)}, {
        key.decode() for key in redis.hkeys(TURNS)
    }


# -- this supervisor -------------------------------------------------------------------------------


def test_the_entry_says_what_this_supervisor_does(me, redis):
    me.turn_number = 42
    me.look()
    entry = json.loads(redis.hget(ENTRIES, "me"))

    assert entry == {
        "beat": 42,  # by which the last release, which knows no turns, sees that we live
        "children": [{"pid": 7}],
        "concurrency": 2,
        "host": socket.gethostname(),
        "keys": [
            {
                "queue": f"wakaq:{name}",
                "head": f"wakaq:head:{name}",
                "inflight": f"wakaq:inflight:{name}:me",
                "stats": f"wakaq:stats:{name}",
            }
            for name in ("high", "low")
        ],
        "pid": os.getpid(),
        "queues": ["high", "low"],
        "same_host": host_identity(),
    }


def test_one_that_is_evicted_does_not_come_back_by_its_entry(me, redis):
    redis.delete(ENTRIES, TURNS)
    me.look()

    assert registered(redis) == (set(), set())


@pytest.mark.parametrize("key", [ENTRIES, TURNS])
def test_a_registry_of_a_wrong_type_is_told_and_ends_the_process_if_it_stays_so(
    me, redis, caplog, key
):
    redis.rename(key, "wakaq:aside")
    redis.set(key, "no hash")
    me.look(BEAT)
    assert caplog.text.count("Redis refuses: ") == 1
    redis.rename("wakaq:aside", key)
    me.look()
    redis.set(key, "no hash")
    me.look(BEAT)
    process = multiprocessing.get_context("fork").Process(target=me.look)
    process.start()
    process.join(10)

    assert process.exitcode == 5
    process.close()


def test_it_does_not_rescue_itself(me, redis):
    redis.hset("wakaq:inflight:low:me", 1, payload("a"))
    me.look(3 * TERM)

    assert registered(redis) == ({"me"}, {"me"})
    assert waiting(redis) == []


def test_what_it_was_itself_before_is_rescued_as_others_are(me, redis):
    redis.hset("wakaq:inflight:low:me", 1, payload("a"))
    me.supervisor_id = "new"
    me.announce()
    me.former_id = "me"
    me.look(2 * ADOPTED_WITHIN)
    assert waiting(redis) == [], "it is about to adopt that"
    me.former_id = ""
    # Its process is this one: nobody else uses that id.
    me.look(ADOPTED_WITHIN)

    assert registered(redis) == ({"new"}, {"new"})
    assert waiting(redis) == [("a", 1)]


# -- who is dead -----------------------------------------------------------------------------------


def test_one_whose_turns_stand_still_for_a_term_is_dead(me, other, redis, caplog):
    other(low="a", high="b")
    redis.rpush(LOW, payload("waits"))
    redis.rpush("wakaq:head:low", payload("moved"))
    assert me.look(TERM - 0.125) is None
    assert registered(redis) == ({"me", "other"}, {"me", "other"})
    me.now += 0.125
    me.look()

    assert waiting(redis) == [("moved", 0), ("a", 1), ("waits", 0)]
    assert waiting(redis, HIGH) == [("b", 1)]
    assert registered(redis) == ({"me"}, {"me"})
    assert redis.keys("wakaq:inflight:*") == []
    assert redis.hget("wakaq:stats:low", "redelivered") == b"1"
    assert "Supervisor other has not moved for 15 s: it is dead" in caplog.text
    assert "Rescued 1 tasks from wakaq:inflight:low:other" in caplog.text


def test_one_whose_turns_go_on_lives(me, other, redis):
    other(low="a")
    for turn in range(20):
        redis.hset(TURNS, "other", f"{turn} 9")
        me.look(BEAT)

    assert registered(redis)[1] == {"me", "other"}
    assert waiting(redis) == []


def test_an_entry_that_is_renewed_is_no_proof_of_life_where_turns_stand_still(me, other, redis):
    for beat in range(4):
        other(beat=beat)
        me.look(BEAT)
    assert registered(redis) == ({"me", "other"}, {"me", "other"})
    me.look(BEAT)

    assert registered(redis) == ({"me"}, {"me"})


def test_only_time_counts_in_which_redis_answered(me, other, redis):
    other(low="a")
    me.look(TERM - 0.125)
    me.error = redis_py.ConnectionError("away")
    me.now += 1.0
    with pytest.raises(redis_py.ConnectionError):
        me.look()
    me.error = None
    me.now += 1.0
    me.look(TERM - 0.125)
    assert waiting(redis) == []
    me.now += 0.125
    me.look()

    assert waiting(redis) == [("a", 1)]


def test_time_does_not_count_in_which_this_process_was_stopped_itself(me, other, redis):
    other(low="a")
    me.look()
    me.now += 2 * BEAT + 0.1
    me.look(TERM - 0.125)
    assert waiting(redis) == []
    me.now += 0.125
    me.look()

    assert waiting(redis) == [("a", 1)]


def test_a_neighbour_whose_process_is_gone_is_rescued_after_a_second(me, other, redis, caplog):
    ended = subprocess.Popen(["true"])
    ended.wait(5)
    other(low="a", same_host=host_identity(), pid=ended.pid)
    assert me.look() == ADOPTED_WITHIN
    me.now += ADOPTED_WITHIN - 0.125
    me.look()
    assert waiting(redis) == []
    me.now += 0.125
    me.look()

    assert waiting(redis) == [("a", 1)]
    assert "Supervisor other of this host is gone" in caplog.text


def test_a_neighbour_that_is_dead_and_was_not_reaped_is_gone_too(me, other, redis):
    zombie = subprocess.Popen(["sleep", "60"])
    other(low="a", same_host=host_identity(), pid=zombie.pid)
    me.look(2 * ADOPTED_WITHIN)
    assert waiting(redis) == []
    zombie.kill()
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    me.look(ADOPTED_WITHIN)
    zombie.wait(5)

    assert waiting(redis) == [("a", 1)]


@pytest.mark.parametrize(
    "fields",
    [
        {"pid": 1},
        {"pid": NEVER_A_PID, "same_host": "another"},
        {"pid": None},
        {"pid": -1},
        {"pid": 2**64},
        {"pid": "7"},
    ],
)
def test_one_that_lives_or_may_live_has_its_term(me, other, redis, fields):
    other(low="a", **{"same_host": host_identity()} | fields)
    me.look(TERM - 0.125)
    assert waiting(redis) == []
    me.now += 0.125
    me.look()

    assert waiting(redis) == [("a", 1)]


# -- rescue ----------------------------------------------------------------------------------------


def test_a_rescue_in_pages_keeps_the_order(me, other, redis):
    names = [f"task{number}" for number in range(2 * PAGE + 50)]
    other(low=names)
    redis.rpush(LOW, payload("waits"))
    me.look(TERM)

    assert waiting(redis) == [*((name, 1) for name in names), ("waits", 0)]


def test_what_is_no_message_is_rescued_as_it_is(me, other, redis):
    other()
    redis.hset("wakaq:inflight:low:other", 1, b"\xff")
    me.look(TERM)

    assert redis.lrange(LOW, 0, -1) == [b"\xff"]


def test_one_that_moves_at_the_last_moment_keeps_what_it_has(me, other, registry, redis):
    other(low="a")
    seen = _Other("other", redis.hget(ENTRIES, "other"), redis.hget(TURNS, "other"))
    redis.hset(TURNS, "other", "4 9")
    me.lease.rescue(registry, seen)

    assert registered(redis)[1] == {"me", "other"}
    assert redis.hlen("wakaq:inflight:low:other") == 1


def test_a_queue_of_a_wrong_type_holds_up_no_other_and_is_tried_again(me, other, redis, caplog):
    other(low="a", high="b")
    redis.set(HIGH, "no list")
    me.look(TERM)
    assert waiting(redis) == [("a", 1)]
    assert registered(redis) == ({"me", "other"}, {"me"})
    assert caplog.text.count("Redis refuses: wakaq:inflight:high:other: WRONGTYPE") == 1
    me.look(2 * TERM)
    assert caplog.text.count("it is dead") == 1
    redis.delete(HIGH)
    me.look(TERM + BEAT)

    assert waiting(redis, HIGH) == [("b", 1)]
    assert registered(redis) == ({"me"}, {"me"})


def test_a_number_without_an_entry_is_a_supervisor_too(me, redis):
    """As when a registration is cut short, or a failover forgets the entry."""
    redis.hset(TURNS, "other", "1 9")
    redis.hset("wakaq:inflight:low:other", 1, payload("a"))
    me.look(TERM)

    assert waiting(redis) == [("a", 1)]
    assert registered(redis) == ({"me"}, {"me"})


def test_an_entry_without_a_number_is_one_too(me, other, redis):
    """As when a rescue was interrupted after it had begun."""
    other(low="a", turn=None)
    me.look(TERM)

    assert waiting(redis) == [("a", 1)]
    assert registered(redis) == ({"me"}, {"me"})


def test_a_rescue_uses_the_keys_of_the_entry_whatever_the_application_calls_them_now(
    me, other, redis
):
    spelled = {
        "queue": "shop:emails",
        "head": "shop:head:emails",
        "inflight": "shop:inflight:emails:other",
        "stats": "shop:stats:emails",
    }
    other(keys=[spelled], queues=["emails"])
    redis.hset("shop:inflight:emails:other", 1, payload("a"))
    redis.rpush("shop:head:emails", payload("moved"))
    me.look(TERM)

    assert waiting(redis, "shop:emails") == [("moved", 0), ("a", 1)]
    assert registered(redis) == ({"me"}, {"me"})
    assert redis.hgetall("shop:stats:emails") == {b"redelivered": b"1"}


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"7", b"\xff", b"[" * 100_000])
def test_an_entry_that_is_no_supervisors_is_told_and_stops_nothing(me, other, redis, caplog, raw):
    redis.hset(ENTRIES, "garbage", raw)
    other(low="a")
    me.look(TERM)

    assert waiting(redis) == [("a", 1)]
    assert caplog.text.count("The registry's entry garbage is no supervisor's") == bool(raw)


@pytest.mark.parametrize("spelled", [[], [7], [{}], [{"queue": 7}], [None]])
def test_an_entry_whose_keys_are_none_has_nothing_to_rescue(me, other, redis, spelled):
    other(keys=spelled)
    me.look(TERM)

    assert registered(redis) == ({"me"}, {"me"})


def test_an_outage_ends_when_the_registry_answers_again(me, outage, caplog):
    outage.begin(redis_py.ConnectionError("away"))
    me.now = outage._failed_at + QUIET + 0.1
    me.look()

    assert "Redis is back after" in caplog.text


# -- the last release ------------------------------------------------------------------------------


@pytest.fixture
def old(redis):
    """A supervisor of the last release: `old(lanes…)` has these in its lanes of the queue low."""

    def old(*lanes, supervisor_id="old", **fields):
        entry = {
            "beat": 1,
            "concurrency": max(len(lanes) - 1, 1),
            "host": "another",
            "same_host": "another",
            "pid": 1,
            "queues": ["high", "low"],
        } | fields
        redis.hset(ENTRIES, supervisor_id, json.dumps(entry))
        redis.hset(TURNS, supervisor_id, 3)
        for lane, calls in enumerate(lanes):
            for call in calls:
                redis.rpush(f"wakaq:inflight:low:{supervisor_id}:{lane}", payload(call))

    return old


def test_one_of_the_last_release_lives_while_its_beat_moves(me, old, redis):
    for beat in range(20):
        old(beat=beat)
        me.look(BEAT)

    assert registered(redis) == ({"me", "old"}, {"me", "old"})


def test_the_turns_of_one_of_the_last_release_are_no_proof(me, old, redis):
    old([], ["a"])
    for turn in range(6):
        redis.hset(TURNS, "old", turn)
        me.look(BEAT)

    assert waiting(redis) == [("a", 1)]


def test_what_a_dead_one_of_the_last_release_had_is_rescued(me, old, redis, caplog):
    old("ab", ["c", "d"], ["e", "coroutine", "f"])
    redis.rpush("wakaq:inflight:high:old:1", payload("h"))
    redis.rpush(LOW, payload("waits"))
    me.look(TERM)

    assert sorted(waiting(redis)[:-1]) == [
        ("a", 1),
        ("b", 1),  # one that arrived: any of them may have been running
        ("c", 1),
        ("coroutine", 0),
        ("d", 0),  # it waited behind another
        ("e", 1),
        ("f", 0),
    ]
    order = [name for name, _ in waiting(redis)]
    assert "".join(order[order.index("c") :][:2]) == "cd"
    assert order[-1] == "waits"
    assert waiting(redis, HIGH) == [("h", 1)]
    assert redis.keys("wakaq:inflight:*") == []
    assert "Rescued 2 tasks from wakaq:inflight:low:old:1" in caplog.text
    # As that release does: its last claim may be on its way.
    assert registered(redis) == ({"me", "dead:old"}, {"me"})


def test_async_tasks_of_the_last_release_may_all_have_been_running(me, old, redis_app, redis):
    async def coroutine(): ...

    redis_app.task(coroutine)
    old([], ["sync", "coroutine", "sync", "coroutine"])
    me.look(TERM)

    assert waiting(redis) == [("sync", 1), ("coroutine", 1), ("sync", 0), ("coroutine", 1)]


def test_what_a_dead_one_of_the_last_release_claims_late_is_rescued_for_an_hour(me, old, redis):
    old([], [])
    me.look(TERM)
    redis.rpush("wakaq:inflight:low:old:1", payload("late"))
    me.look(BEAT)
    assert waiting(redis) == [("late", 1)]
    me.look(1_200.0)
    redis.rpush("wakaq:inflight:low:old:1", payload("later"))
    me.look(BEAT)
    assert waiting(redis) == [("late", 1)], "later on, it is looked at once a minute"
    me.look(60.0)
    assert waiting(redis) == [("later", 1), ("late", 1)]
    assert registered(redis)[0] == {"me", "dead:old"}
    me.look(2_400.0)

    assert registered(redis)[0] == {"me"}


def test_an_outage_is_no_reason_to_look_for_another_hour(me, old, redis):
    old([], [])
    me.look(TERM)
    me.look(3_000.0)
    me.now += 100.0
    me.look(600.0 + BEAT)

    assert registered(redis)[0] == {"me"}


@pytest.mark.parametrize("release", ["this", "last"])
def test_two_observers_rescue_what_one_had_once(make_me, other, old, redis, release):
    one, two = make_me("me"), make_me("me")  # else each would be a former id of the other
    if release == "this":
        other(low="ab")
    else:
        old("ab")
    for _ in range(7):
        one.look()
        two.look()
        one.now = two.now = one.now + BEAT

    assert waiting(redis) == [("a", 1), ("b", 1)]
    assert registered(redis)[1] == {"me"}


def test_one_of_the_last_release_whose_beat_moves_at_the_last_moment_is_left_alone(
    me, old, registry, redis
):
    old([], ["a"])
    seen = _Other("old", redis.hget(ENTRIES, "old"), b"3")
    old(beat=2)
    me.lease.rescue(registry, seen)

    assert waiting(redis) == []
    assert registered(redis)[0] == {"me", "old"}


def test_one_of_ours_that_the_last_release_has_declared_dead_is_rescued_from_our_hash(
    me, other, redis
):
    """That release renames the entry, and deletes the number; it does not know of our hashes."""
    names = [f"task{number}" for number in range(PAGE + 10)]
    other(low=names)
    redis.hset(ENTRIES, "dead:other", redis.hget(ENTRIES, "other"))
    redis.hdel(ENTRIES, "other")
    redis.hdel(TURNS, "other")
    me.look()
    me.look(BEAT)

    assert waiting(redis) == [(name, 1) for name in names]
    assert registered(redis) == ({"me"}, {"me"})


def test_a_tombstone_of_ours_stays_while_something_cannot_be_rescued_and_stops_nothing(
    me, other, redis
):
    other("ours", low="a", high="b")
    redis.hset(ENTRIES, "dead:ours", redis.hget(ENTRIES, "ours"))
    redis.hdel(ENTRIES, "ours")
    redis.hdel(TURNS, "ours")
    redis.set(LOW, "no list")
    other(high="c")
    me.look(TERM)
    assert waiting(redis, HIGH) == [("c", 1), ("b", 1)]
    assert registered(redis)[0] == {"me", "dead:ours"}
    redis.delete(LOW)
    me.look(BEAT)

    assert waiting(redis) == [("a", 1)]
    assert registered(redis)[0] == {"me"}


@pytest.mark.parametrize(
    "fields",
    [
        {"concurrency": "x"},
        {"concurrency": 10**12},
        {"queues": "low"},
        {"queues": [7, "no such name!", "low"]},
    ],
)
def test_an_entry_of_the_last_release_may_say_anything(me, old, redis, fields, monkeypatch):
    monkeypatch.setattr(keys, "MOST_OLD_LANES", 50)  # of which it looks at each
    old([], ["a"], **fields)
    me.look(TERM)

    assert waiting(redis) == [("a", 1)]


def test_a_queue_that_this_application_does_not_have_is_rescued_too(me, old, redis):
    old(queues=["gone"])
    redis.rpush("wakaq:inflight:gone:old:1", payload("a"))
    me.look(TERM)

    assert waiting(redis, "wakaq:gone") == [("a", 1)]
