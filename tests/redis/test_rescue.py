"""Putting payloads back: of dead supervisors, of dead workers' orphans, and of dead letters."""

import contextlib

import pytest
import redis as redis_py

from wakaq.inspector import Inspector
from wakaq.letters import Letter

LOW, LANE, STATS = "wakaq:low", "wakaq:inflight:low:me:1", "wakaq:stats:low"


@pytest.fixture
def broker(two_queues):
    return two_queues.broker


@pytest.fixture
def low(two_queues):
    return two_queues.queues[1]


def test_a_rescue_puts_payloads_back_in_their_order(broker, redis, database, lanes):
    redis.rpush(LOW, "waits")
    redis.rpush(LANE, "a", "b", "c")
    pairs = [(b"a", b"A"), (b"b", b"b"), (b"c", b"c")]

    assert broker.rescue(lanes()[1], pairs) == 3
    assert database() == {LOW: ["A", "b", "c", "waits"], STATS: {"redelivered": "1"}}


def test_two_rescuers_move_each_payload_once(broker, redis, database, lanes):
    redis.rpush(LANE, "a", "b")
    pairs = [(b"a", b"A"), (b"b", b"b")]

    assert [broker.rescue(lanes()[1], pairs) for _ in range(2)] == [2, 0]
    assert database() == {LOW: ["A", "b"], STATS: {"redelivered": "1"}}


def test_a_rescue_into_a_key_of_a_wrong_type_loses_nothing(broker, redis, lanes):
    redis.set(LOW, "text")
    redis.rpush(LANE, "a")
    with pytest.raises(redis_py.ResponseError, match="WRONGTYPE wakaq:low is a string"):
        broker.rescue(lanes()[1], [(b"a", b"A")])

    assert redis.lrange(LANE, 0, -1) == [b"a"]


def test_a_full_server_still_lets_rescue(broker, redis, lanes):
    redis.rpush(LANE, "a")
    redis.config_set("maxmemory", 1)
    try:
        assert broker.rescue(lanes()[1], [(b"a", b"A")]) == 1
    finally:
        redis.config_set("maxmemory", 0)


def test_an_orphan_adopts_what_was_not_rescued(broker, redis, database, lanes):
    redis.rpush(LANE, "a", "b")
    own = lanes(1, "orphan")[1]

    assert broker.adopt(lanes()[1], own, b"b")
    assert not broker.adopt(lanes()[1], own, b"gone")
    assert database() == {LANE: ["a"], "wakaq:inflight:low:orphan:1": ["b"]}


@pytest.fixture
def inspector(two_queues):
    with contextlib.closing(Inspector(two_queues.settings, two_queues.queues)) as inspector:
        yield inspector


@pytest.mark.parametrize(
    "letter",
    [
        (b'{"name":"a", "args": []}', '{"name":"a", "args": []}'),
        (
            b'{"name": "a", "args": [1e3], "retry": 2, "redelivered": 1}',
            '{"name": "a", "args": [1000.0]}',
        ),
        (b"no message", "no message"),
    ],
)
def test_a_revived_letter_starts_anew_at_the_end(inspector, low, redis, letter):
    payload, revived = letter
    redis.rpush(LOW, "waits")
    letters = [Letter(payload, "raised", "", "w").encode(), b"another"]
    redis.rpush("wakaq:dead:low", *letters)

    assert inspector.revive(low, letters[0])
    assert not inspector.revive(low, letters[0])
    assert redis.lrange(LOW, 0, -1) == [b"waits", revived.encode()]
    assert redis.lrange("wakaq:dead:low", 0, -1) == [b"another"]


def test_a_letter_that_cannot_be_put_back_is_kept(inspector, low, redis):
    redis.set(LOW, "text")
    letter = Letter(b"a", "raised", "", "w").encode()
    redis.rpush("wakaq:dead:low", letter)
    with pytest.raises(redis_py.ResponseError, match="WRONGTYPE wakaq:low is a string"):
        inspector.revive(low, letter)

    assert redis.lrange("wakaq:dead:low", 0, -1) == [letter]
