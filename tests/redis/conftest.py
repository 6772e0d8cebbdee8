"""A broker on the real server, and the whole database as a dict to compare with."""

import contextlib

import re

import pytest
import redis as redis_py

from wakaq import WakaQ
from wakaq.store.turns import InFlight, Registered


def read_key(redis, key):
    match redis.type(key):
        case b"list":
            return [element.decode() for element in redis.lrange(key, 0, -1)]
        case b"hash":
            return {f.decode(): value.decode() for f, value in redis.hgetall(key).items()}
        case b"zset":
            return {m.decode(): score for m, score in redis.zrange(key, 0, -1, withscores=True)}
        case _:
            return redis.get(key).decode()


@pytest.fixture
def database(redis):
    """`database()` returns all that is in Redis: key to contents; a new turn's token is a T."""

    def read():
        found = {key.decode(): read_key(redis, key) for key in redis.keys("*")}
        turns = found.get("wakaq:registry:turns")
        if isinstance(turns, dict):
            # As numbers these are longer than any that a test makes up.
            turns.update({one: re.sub(r" \d{16}\b", " T", turn) for one, turn in turns.items()})
        return found

    return read


@pytest.fixture
def two_queues(app_url):
    """An application with the queues `high` and `low`, and a broker of its own."""
    app = WakaQ(queues=[(0, "high"), (1, "low")], url=app_url, dead_letters=2, wait_timeout=0.1)
    with contextlib.closing(app.broker):
        yield app


@pytest.fixture
def broker(two_queues):
    return two_queues.broker


@pytest.fixture
def group(broker):
    """The one slot group of a standalone server."""
    (group,) = broker.groups
    return group


@pytest.fixture
def registered(redis, broker, group):
    """`registered(id)` returns what a supervisor of this id has in flight, before its first turn."""

    def register(supervisor_id="me"):
        redis.hset(group.turns, supervisor_id, "0 7")
        inflight = InFlight(broker, group)
        inflight.begin(Registered(supervisor_id, "7"))
        return inflight

    return register


@pytest.fixture
def take_turn(broker):
    """`take_turn(inflight, wanted=0)` makes a turn, and returns what it claimed."""

    def take(inflight, wanted=0):
        turn = inflight.turn(wanted)
        answer = turn.send(broker)
        assert answer is not None, "evicted"
        return inflight.answered(turn, answer)

    return take


@pytest.fixture
def full(redis):
    """`with full():` has the server out of memory."""

    @contextlib.contextmanager
    def fill():
        redis.config_set("maxmemory", 1)
        try:
            with pytest.raises(redis_py.exceptions.OutOfMemoryError):
                redis.set("key", "value")
            yield
        finally:
            redis.config_set("maxmemory", 0)

    return fill
