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


class Process(InFlight):
    """What a supervisor has in flight, whose turns are made and answered in one go."""

    def __init__(self, redis, broker, group):
        super().__init__(broker, group)
        self._redis = redis

    def begin_as(self, supervisor_id):
        """Go on under this id, which is registered."""
        self._redis.hset(self._group.turns, supervisor_id, "0 7")
        self.begin(Registered(supervisor_id, "7"))

    def take_turn(self, wanted=0):
        """Make a turn; returns what it claimed."""
        turn = self.turn(wanted)
        answer = turn.send(self._broker)
        assert answer is not None, "evicted"
        return self.answered(turn, answer)

    def hold(self, *low, high=()):
        """Claim these, from the queues `high` and `low`; returns the claims."""
        for queue, payloads in zip(self._group.queues, (high, low), strict=True):
            if payloads:
                self._redis.rpush(self._broker.keys.of(queue).queue, *payloads)
        return self.take_turn(len(high) + len(low))

    def take_over(self, *, takes_rest=True):
        """Make the first turn of an id, which adopts from the one before."""
        request = self.adopt(takes_rest=takes_rest)
        answer = request.send(self._broker)
        assert answer is not None, "evicted"
        self.adopted(request, answer)


@pytest.fixture
def make_process(redis, broker, group):
    """`make_process()` returns what a process has in flight that has no id yet."""
    return lambda: Process(redis, broker, group)


@pytest.fixture
def me(make_process):
    """What the supervisor `me` has in flight, before its first turn."""
    process = make_process()
    process.begin_as("me")
    return process


@pytest.fixture
def full(redis):
    """Return a context in which the server is out of memory."""

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
