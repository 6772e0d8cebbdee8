"""Retrying and purging dead letters: the whole database before and after."""

import pytest
import redis as redis_py

from wakaq.store.dead_letter import DeadLetter
from wakaq.store.inspect import Inspector

LOW, DEAD = "wakaq:low", "wakaq:dead:low"


@pytest.fixture
def inspector(broker):
    return Inspector(broker)


@pytest.fixture
def low(two_queues):
    return two_queues.queues[1]


def letter(payload):
    return DeadLetter(payload, "raised", "", "worker").encode()


@pytest.mark.parametrize(
    ("payload", "retried"),
    [
        (b'{"name":"a", "args": []}', b'{"name":"a", "args": []}'),
        (
            b'{"name": "a", "args": [1e3], "retry": 2, "redelivered": 1}',
            b'{"name": "a", "args": [1000.0]}',
        ),
        (b"no message", b"no message"),
        (b"\xff\x00", b"\xff\x00"),
    ],
)
def test_a_dead_letter_starts_anew_at_the_end_of_its_queue(inspector, low, redis, payload, retried):
    redis.rpush(LOW, "waits")
    redis.rpush(DEAD, letter(payload), "another")

    assert inspector.retry_dead_letter(low, letter(payload))
    assert not inspector.retry_dead_letter(low, letter(payload))
    assert redis.lrange(LOW, 0, -1) == [b"waits", retried]
    assert redis.lrange(DEAD, 0, -1) == [b"another"]


def test_of_equal_dead_letters_one_is_retried(inspector, low, redis):
    redis.rpush(DEAD, letter(b"a"), "another", letter(b"a"))

    assert inspector.retry_dead_letter(low, letter(b"a"))
    assert redis.lrange(LOW, 0, -1) == [b"a"]
    assert redis.lrange(DEAD, 0, -1) == [letter(b"a"), b"another"]


def test_a_dead_letter_that_cannot_be_put_back_is_kept(inspector, low, redis, database):
    redis.set(LOW, "text")
    redis.rpush(DEAD, letter(b"a"))
    before = database()
    with pytest.raises(redis_py.ResponseError, match="WRONGTYPE wakaq:low is a string"):
        inspector.retry_dead_letter(low, letter(b"a"))

    assert database() == before


def test_dead_letters_are_purged_one_each(inspector, low, redis):
    redis.rpush(DEAD, "a", "b", "a")

    assert inspector.purge_dead_letters(low, [b"a", b"gone"]) == 1
    assert redis.lrange(DEAD, 0, -1) == [b"a", b"b"]
