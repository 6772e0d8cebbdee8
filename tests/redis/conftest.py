"""A broker on the real server, and the whole database as a dict to compare with."""

import contextlib

import pytest

from wakaq import WakaQ


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
    """`database()` returns all that is in Redis: key to contents."""
    return lambda: {key.decode(): read_key(redis, key) for key in redis.keys("*")}


@pytest.fixture
def two_queues(app_url):
    """An application with the queues `high` and `low`, and a broker of its own."""
    app = WakaQ(queues=[(0, "high"), (1, "low")], url=app_url, dead_letters=2, wait_timeout=0.1)
    with contextlib.closing(app.broker):
        yield app


@pytest.fixture
def lanes(two_queues):
    """`lanes(number)` returns a child's lanes of the supervisor `me`, high first."""
    broker, queues = two_queues.broker, two_queues.queues
    return lambda number=1, worker_id="me": [broker.lane(q, worker_id, number) for q in queues]
