"""The last turn: what `leave` makes of the whole database."""

import pytest

from wakaq.store.settlement import ACK

TURNS, REGISTRY = "wakaq:registry:turns", "wakaq:registry:workers"
HIGH, LOW = "wakaq:high", "wakaq:low"
HEAD_HIGH, HEAD_LOW = "wakaq:head:high", "wakaq:head:low"
IN_LOW = "wakaq:inflight:low:me"


@pytest.fixture(autouse=True)
def others(redis):
    redis.hset(TURNS, "other", "5 7")
    redis.hset(REGISTRY, mapping={"me": "{}", "other": "{}"})


LEFT = {TURNS: {"other": "5 7"}, REGISTRY: {"other": "{}"}}


def test_who_has_nothing_in_flight_leaves(me, broker, database):
    assert me.leave().send(broker)
    assert database() == LEFT


def test_heads_go_back_to_the_front_in_their_order(me, broker, redis, database):
    redis.rpush(HIGH, "c")
    redis.rpush(HEAD_HIGH, "a", "b")
    redis.rpush(HEAD_LOW, "x")
    me.leave().send(broker)

    assert database() == LEFT | {HIGH: ["a", "b", "c"], LOW: ["x"]}


def test_a_leave_that_is_sent_again_has_left(me, broker, redis, database):
    leave = me.leave()
    assert leave.send(broker)
    redis.rpush(HEAD_LOW, "moved since")
    before = database()

    assert leave.send(broker)
    assert database() == before


def test_who_has_something_in_flight_stays(me, broker, redis, database):
    redis.rpush(LOW, "a")
    (claim,) = me.take_turn(1)
    redis.rpush(HEAD_LOW, "b")
    before = database()
    assert not me.leave().send(broker)
    assert database() == before

    # It is still the next turn that a turn may be, too.
    me.settle(claim, ACK)
    me.take_turn()
    assert me.leave().send(broker)


@pytest.mark.parametrize("state", [None, "0 8", "1 7", "4 7"])
def test_who_was_evicted_has_left_and_changes_nothing(me, broker, redis, database, state):
    redis.hdel(TURNS, "me")
    if state:
        redis.hset(TURNS, "me", state)
    redis.rpush(HEAD_LOW, "a")
    redis.hset(IN_LOW, "1", "b")
    before = database()

    assert me.leave().send(broker)
    assert database() == before


def test_a_leave_that_arrives_after_another_turn_changes_nothing(me, broker, database):
    late = me.leave()
    me.take_turn()
    before = database()
    late.send(broker)

    assert database() == before


@pytest.mark.parametrize("broken", [HIGH, HEAD_HIGH])
def test_a_key_of_a_wrong_type_keeps_nobody(me, broker, redis, database, broken):
    redis.set(broken, "text")
    for key in {HIGH, HEAD_HIGH} - {broken}:
        redis.rpush(key, "a")
    redis.rpush(HEAD_LOW, "x")
    assert me.leave().send(broker)

    kept = HIGH if broken == HEAD_HIGH else HEAD_HIGH
    assert database() == LEFT | {broken: "text", kept: ["a"], LOW: ["x"]}


def test_a_registry_of_a_wrong_type_keeps_nobody(me, broker, redis, database):
    redis.delete(REGISTRY)
    redis.set(REGISTRY, "text")
    assert me.leave().send(broker)

    assert database() == {TURNS: {"other": "5 7"}, REGISTRY: "text"}


def test_who_leaves_a_server_that_is_full_puts_heads_back(me, broker, redis, database, full):
    redis.rpush(HEAD_LOW, "a")
    with full():
        assert me.leave().send(broker)

    assert database() == LEFT | {LOW: ["a"]}
