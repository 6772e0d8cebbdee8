"""Rescuing a dead supervisor, step by step: the whole database before and after each."""

import pytest
import redis as redis_py

from wakaq.store.registry import EntryKeys, Registry

TURNS, REGISTRY = "wakaq:registry:turns", "wakaq:registry:workers"
HIGH, LOW, HEAD_LOW, STATS = "wakaq:high", "wakaq:low", "wakaq:head:low", "wakaq:stats:low"
IN_HIGH, IN_LOW = "wakaq:inflight:high:dead", "wakaq:inflight:low:dead"
KEYS = EntryKeys(LOW, HEAD_LOW, IN_LOW, STATS)
ENTRY = {REGISTRY: {"dead": "{}"}}


@pytest.fixture
def registry(broker, group, redis):
    redis.hset(TURNS, "dead", "5 7 1:3:1")
    redis.hset(REGISTRY, "dead", "{}")
    return Registry(broker, group)


@pytest.fixture
def rescue(registry):
    """`rescue(number, payload, new, …)` rescues this page of the queue `low`."""

    def rescue(*page):
        triples = zip(page[::3], page[1::3], page[2::3], strict=True)
        return registry.rescue("dead", KEYS, list(triples))

    return rescue


# -- the fence -------------------------------------------------------------------------------------


def test_who_stands_still_is_evicted_and_keeps_its_entry(registry, database):
    assert registry.fence("dead", b"5 7 1:3:1")
    assert database() == ENTRY


def test_who_has_no_number_stands_still(registry, redis, database):
    redis.hdel(TURNS, "dead")

    assert registry.fence("dead", b"")
    assert database() == ENTRY


@pytest.mark.parametrize("seen", [b"", b"4 6", b"5 7", b"5 8 1:3:1"])
def test_who_has_moved_is_not_evicted(registry, database, seen):
    before = database()

    assert not registry.fence("dead", seen)
    assert database() == before


# -- pages -----------------------------------------------------------------------------------------


def test_a_page_goes_to_the_front_in_its_order_and_evicts_again(rescue, redis, database):
    redis.rpush(LOW, "waits")
    redis.hset(IN_LOW, mapping={"3": "c", "1": "a", "2": "b", "4": "another page's"})

    assert rescue(1, b"a", b"A", 2, b"b", b"b", 3, b"c", b"C") == 3
    assert database() == ENTRY | {
        LOW: ["A", "b", "C", "waits"],
        IN_LOW: {"4": "another page's"},
        STATS: {"redelivered": "2"},
    }


def test_pages_from_the_last_to_the_first_keep_the_order(registry, rescue, redis, database):
    redis.hset(IN_LOW, mapping={number: number for number in range(1, 11)})
    numbers = registry.inflight(KEYS)
    for start in (8, 4, 0):
        part = numbers[start : start + 4]
        payloads = registry.payloads(KEYS, part)
        rescue(*(one for n, p in zip(part, payloads, strict=True) for one in (n, p, p)))

    assert database() == ENTRY | {LOW: [str(number) for number in range(1, 11)]}


def test_two_rescuers_move_each_payload_once(rescue, redis, database):
    redis.hset(IN_LOW, mapping={"1": "a", "2": "b"})
    page = (1, b"a", b"A", 2, b"b", b"b")

    assert [rescue(*page) for _ in range(2)] == [2, 0]
    assert database() == ENTRY | {LOW: ["A", "b"], STATS: {"redelivered": "1"}}


def test_a_number_with_other_bytes_is_left_alone(rescue, redis, database):
    redis.hset(IN_LOW, mapping={"1": "another", "2": "b"})

    assert rescue(1, b"a", b"A", 2, b"b", b"b", 3, b"gone", b"gone") == 1
    assert database() == ENTRY | {LOW: ["b"], IN_LOW: {"1": "another"}}


def test_payloads_are_opaque_bytes(registry, rescue, redis):
    secrets = [b"\x00\xff\r\n", b"", b"x" * 100_000]
    redis.hset(IN_LOW, mapping=dict(enumerate(secrets)))

    assert registry.payloads(KEYS, [0, 1, 2, 3]) == [*secrets, None]
    assert rescue(*(one for n, p in enumerate(secrets) for one in (n, p, p))) == 3
    assert redis.lrange(LOW, 0, -1) == secrets


def test_a_rescue_into_a_key_of_a_wrong_type_loses_nothing(rescue, redis, database):
    redis.set(LOW, "text")
    redis.hset(IN_LOW, "1", "a")
    with pytest.raises(redis_py.ResponseError, match="WRONGTYPE"):
        rescue(1, b"a", b"A")

    assert database() == ENTRY | {LOW: "text", IN_LOW: {"1": "a"}}


def test_a_counter_of_a_wrong_type_stops_no_rescue(rescue, redis, database):
    redis.set(STATS, "text")
    redis.hset(IN_LOW, "1", "a")

    assert rescue(1, b"a", b"A") == 1
    assert database() == ENTRY | {LOW: ["A"], STATS: "text"}


def test_a_full_server_lets_rescue(rescue, registry, redis, full, database):
    redis.hset(IN_LOW, "1", "a")
    redis.rpush(HEAD_LOW, "first")
    with full():
        assert registry.fence("dead", b"5 7 1:3:1")
        assert rescue(1, b"a", b"A") == 1
        assert registry.forget("dead", registry.own_keys("dead"))

    assert database()[LOW] == ["first", "A"]


def test_a_dead_supervisors_late_turn_claims_nothing_between_two_pages(
    registry, broker, rescue, redis, make_process
):
    inflight = make_process()
    inflight.begin_as("dead")
    redis.rpush(LOW, "a", "b")
    inflight.take_turn(2)
    late = inflight.turn(5)
    state = redis.hget(TURNS, "dead")
    registry.fence("dead", state)
    redis.hset(TURNS, "dead", state)  # as a failover brings it back, which has not seen the fence
    rescue(2, b"b", b"b")

    assert late.send(broker) is None
    assert redis.lrange(LOW, 0, -1) == [b"b"]
    assert redis.hgetall(IN_LOW) == {b"1": b"a"}


# -- the end ---------------------------------------------------------------------------------------


def test_who_has_nothing_in_flight_is_forgotten_and_heads_go_back(registry, redis, database):
    redis.hset(TURNS, "other", "1 7")
    redis.rpush(HEAD_LOW, "a", "b")
    redis.rpush(LOW, "c")

    assert registry.forget("dead", registry.own_keys("dead"))
    assert database() == {LOW: ["a", "b", "c"], TURNS: {"other": "1 7"}}


def test_who_has_something_in_flight_is_evicted_again_and_not_forgotten(registry, redis, database):
    redis.hset(IN_HIGH, "1", "a")
    redis.rpush(HEAD_LOW, "b")

    assert not registry.forget("dead", registry.own_keys("dead"))
    assert database() == ENTRY | {IN_HIGH: {"1": "a"}, HEAD_LOW: ["b"]}


def test_who_is_forgotten_twice_is_gone(registry, database):
    for _ in range(2):
        assert registry.forget("dead", registry.own_keys("dead"))

    assert database() == {}


@pytest.mark.parametrize("broken", [LOW, HEAD_LOW])
def test_a_key_of_a_wrong_type_keeps_nobody_on_the_registry(registry, redis, database, broken):
    redis.set(broken, "text")

    assert registry.forget("dead", registry.own_keys("dead"))
    assert database() == {broken: "text"}
