"""Announcing a supervisor, and renewing its entry: the whole database before and after."""

import json

import pytest
import redis as redis_py

from wakaq.store.registry import Registry, keys_of_entry, new_supervisor_id, read_entry
from wakaq.store.turns import Registration

TURNS, REGISTRY = "wakaq:registry:turns", "wakaq:registry:workers"


@pytest.fixture
def registry(broker, group):
    return Registry(broker, group)


@pytest.fixture
def registration(group):
    return Registration(group, lambda supervisor_id: {"id": supervisor_id})


def test_a_supervisor_has_an_entry_and_a_number_before_its_first_turn(
    registration, broker, database, make_process
):
    registered = registration.send(broker)
    me = registered.supervisor_id
    assert database() == {TURNS: {me: "0 T"}, REGISTRY: {me: json.dumps({"id": me})}}

    inflight = make_process()
    inflight.begin(registered)
    inflight.take_turn()
    assert database()[TURNS] == {me: "1 T"}


def test_each_attempt_is_another_id(registration, broker, redis):
    ids = {registration.send(broker).supervisor_id for _ in range(3)}

    assert len(ids) == redis.hlen(TURNS) == 3


def test_an_id_that_is_taken_is_left_alone(broker, group, redis, database):
    redis.hset(TURNS, "me", "12 7")
    redis.hset(REGISTRY, "me", "{}")
    before = database()

    assert broker.register(group, "me", {"another": 1}) is None
    assert database() == before


def test_a_late_attempt_does_not_let_an_old_turn_through(me, broker, group, redis):
    redis.rpush("wakaq:low", "a")
    late = me.turn(1)
    redis.delete(TURNS)
    broker.register(group, "me", {})

    assert late.send(broker) is None


@pytest.mark.parametrize("broken", [TURNS, REGISTRY])
def test_a_registry_of_a_wrong_type_is_told_and_nothing_is_left(
    registration, broker, redis, database, broken
):
    redis.set(broken, "text")
    with pytest.raises(redis_py.ResponseError, match="WRONGTYPE"):
        registration.send(broker)

    assert database() == {broken: "text"}


def test_a_full_server_lets_register(registration, broker, full, redis):
    with full():
        assert registration.send(broker)

    assert redis.hlen(TURNS) == redis.hlen(REGISTRY) == 1


# -- entries ---------------------------------------------------------------------------------------


def test_an_entry_is_renewed_while_its_supervisor_has_a_number(registry, redis, database):
    redis.hset(TURNS, "me", "3 7")

    assert registry.beat("me", {"children": []})
    assert database() == {TURNS: {"me": "3 7"}, REGISTRY: {"me": '{"children": []}'}}


def test_who_was_evicted_gets_no_entry_again(registry, redis, database):
    redis.hset(TURNS, "other", "3 7")

    assert not registry.beat("me", {"children": []})
    assert database() == {TURNS: {"other": "3 7"}}


def test_a_full_server_lets_entries_be_renewed(registry, redis, full):
    redis.hset(TURNS, "me", "3 7")
    with full():
        assert registry.beat("me", {})


def test_an_entry_names_its_keys_as_they_are(registry):
    entry = registry.new_entry("me", 5, 2, children=[1])

    assert read_entry(json.dumps(entry).encode()) == entry
    assert keys_of_entry(entry) == registry.own_keys("me")
    assert [keys.inflight for keys in registry.own_keys("me")] == [
        "wakaq:inflight:high:me",
        "wakaq:inflight:low:me",
    ]
    assert {name: entry[name] for name in ("beat", "concurrency", "queues", "children")} == {
        "beat": 5,
        "concurrency": 2,
        "queues": ["high", "low"],
        "children": [1],
    }


@pytest.mark.parametrize("raw", [b"", b"no JSON", b"[]", b"1", b"\xff", b"[" * 100_000])
def test_what_is_no_entry_reads_as_an_empty_one(raw):
    assert read_entry(raw) == {}
    assert keys_of_entry({}) is None


@pytest.mark.parametrize("one", [1, None, {}, {"queue": "q"}, {"queue": 1, "head": "h"}])
def test_keys_that_are_none_are_left_out(one):
    assert keys_of_entry({"keys": [one]}) == []


def test_ids_are_never_the_same_and_tell_where_they_are():
    ids = {new_supervisor_id() for _ in range(1_000)}

    assert len(ids) == 1_000
    assert all(":" not in one for one in ids)


def test_all_that_are_registered_are_seen(registry, redis):
    redis.hset(TURNS, mapping={"me": "3 7 0:1:2", "without entry": "0 7"})
    redis.hset(REGISTRY, mapping={"me": "{}", "without number": b"\xff"})

    assert registry.turns() == {"me": b"3 7 0:1:2", "without entry": b"0 7"}
    assert registry.entries() == {"me": b"{}", "without number": b"\xff"}
