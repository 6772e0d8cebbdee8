"""What waits for its time in Redis: delaying, promoting, and firing the ticks of schedules."""

import logging
import math
import signal
import threading
import time
from contextlib import closing

import pytest
import redis as redis_py

from wakaq import WakaQ
from wakaq.message import Call
from wakaq.store.broker import Broker


@pytest.fixture
def broker(app_url):
    app = WakaQ(queues=["high", "low"], url=app_url)
    with closing(Broker(app.settings, app.queues)) as broker:
        yield broker


def contents(redis):
    """Return the whole database."""
    readers = {
        b"string": redis.get,
        b"list": lambda key: redis.lrange(key, 0, -1),
        b"zset": lambda key: [member for member, _ in redis.zrange(key, 0, -1, withscores=True)],
    }
    return {key.decode(): readers[redis.type(key)](key) for key in redis.keys("*")}


# -- delay -----------------------------------------------------------------------------------------


def test_a_delay_is_counted_on_the_servers_clock(broker, redis):
    before = broker.time()
    broker.enqueue_all([Call(broker.queues[0], b"a", delay=1.5)])
    after = broker.time()

    assert contents(redis) == {"wakaq:eta:high": [b"a"]}
    assert before + 1.5 <= redis.zscore("wakaq:eta:high", "a") <= after + 1.5


def test_a_moment_is_kept_to_the_microsecond(broker, redis):
    broker.enqueue_all([Call(broker.queues[1], b"a", at=1_800_000_000.123456)])

    assert redis.zscore("wakaq:eta:low", "a") == 1_800_000_000.123456


def test_the_same_call_delayed_twice_is_one_and_keeps_its_time(broker, redis):
    broker.enqueue_all([Call(broker.queues[0], b"a", at=1.0), Call(broker.queues[0], b"b", at=2.0)])
    broker.enqueue_all([Call(broker.queues[0], b"a", at=3.0)])
    broker.enqueue_all([Call(broker.queues[0], b"b", delay=3600.0)])

    assert redis.zrange("wakaq:eta:high", 0, -1, withscores=True) == [(b"a", 1.0), (b"b", 2.0)]


def test_more_threads_may_delay_at_once_than_a_pool_has_by_default(make_server):
    server = make_server()
    app = WakaQ(queues=["high"], url=server.url)
    with closing(server.client()) as client, closing(Broker(app.settings, app.queues)) as broker:
        broker.ping()
        server.process.send_signal(signal.SIGSTOP)
        calls = [[Call(broker.queues[0], b"%d" % number, delay=60)] for number in range(150)]
        threads = [threading.Thread(target=broker.enqueue_all, args=[call]) for call in calls]
        for thread in threads:
            thread.start()
        server.process.send_signal(signal.SIGCONT)
        for thread in threads:
            thread.join()

        assert client.zcard("wakaq:eta:high") == 150


# -- promote ---------------------------------------------------------------------------------------


def test_what_is_due_goes_to_the_front_the_oldest_first(broker, redis):
    redis.rpush("wakaq:high", "x", "y")
    redis.zadd("wakaq:eta:high", {"second": 2, "first": 1, "third": 2.5, "later": 9e9})
    redis.zadd("wakaq:eta:low", {"other": 1})

    moved, wait = broker.promote(broker.groups[0], 1_000)

    assert moved == 4
    assert wait == pytest.approx(9e9 - broker.time(), abs=1)
    assert contents(redis) == {
        "wakaq:high": [b"first", b"second", b"third", b"x", b"y"],
        "wakaq:low": [b"other"],
        "wakaq:eta:high": [b"later"],
    }


def test_nothing_delayed_is_nothing_to_wait_for(broker, redis):
    assert broker.promote(broker.groups[0], 1_000) == (0, math.inf)
    assert contents(redis) == {}


def test_the_wait_is_for_the_first_of_all_queues(broker, redis):
    now = broker.time()
    redis.zadd("wakaq:eta:high", {"a": now + 60})
    redis.zadd("wakaq:eta:low", {"b": now + 30})

    moved, wait = broker.promote(broker.groups[0], 1_000)

    assert moved == 0
    assert wait == pytest.approx(30, abs=1)


def test_one_call_moves_no_more_than_it_may_over_all_queues(broker, redis):
    redis.zadd("wakaq:eta:high", {f"h{i}": i for i in range(5)})
    redis.zadd("wakaq:eta:low", {f"l{i}": i for i in range(5)})

    assert broker.promote(broker.groups[0], 7) == (7, 0.0)
    assert redis.llen("wakaq:high") == 5
    assert redis.lrange("wakaq:low", 0, -1) == [b"l0", b"l1"]
    assert broker.promote(broker.groups[0], 7) == (3, math.inf)
    assert redis.lrange("wakaq:low", 0, -1) == [b"l2", b"l3", b"l4", b"l0", b"l1"]


def test_a_key_of_a_wrong_type_loses_nothing_and_stops_no_other_queue(broker, redis, caplog):
    redis.set("wakaq:high", "no list")
    redis.zadd("wakaq:eta:high", {"a": 1})
    redis.zadd("wakaq:eta:low", {"b": 1})

    with caplog.at_level(logging.ERROR, "wakaq"):
        assert broker.promote(broker.groups[0], 1_000)[0] == 1

    assert "wakaq:eta:high" in caplog.text
    assert "eta:high: WRONGTYPE" in caplog.text
    assert contents(redis) == {
        "wakaq:high": b"no list",
        "wakaq:eta:high": [b"a"],
        "wakaq:low": [b"b"],
    }


def test_a_set_of_a_wrong_type_stops_no_other_queue(broker, redis, caplog):
    redis.rpush("wakaq:eta:high", "no set")
    redis.zadd("wakaq:eta:low", {"b": 1})

    assert broker.promote(broker.groups[0], 1_000) == (1, math.inf)
    assert redis.lrange("wakaq:low", 0, -1) == [b"b"]
    assert "wakaq:eta:high" in caplog.text


def test_a_server_that_is_out_of_memory_still_promotes(make_server):
    server = make_server()
    app = WakaQ(queues=["high"], url=server.url)
    with closing(server.client()) as client, closing(Broker(app.settings, app.queues)) as broker:
        client.zadd("wakaq:eta:high", {"a": 1})
        client.config_set("maxmemory", 1)
        with pytest.raises(redis_py.exceptions.OutOfMemoryError):
            client.set("x", "y")

        assert broker.promote(broker.groups[0], 1_000) == (1, math.inf)
        assert client.lrange("wakaq:high", 0, -1) == [b"a"]


def test_a_replica_is_an_outage_and_not_a_refusal(make_server):
    server = make_server()
    app = WakaQ(queues=["high"], url=server.url)
    with closing(server.client()) as client, closing(Broker(app.settings, app.queues)) as broker:
        client.zadd("wakaq:eta:high", {"a": 1})
        client.replicaof("127.0.0.1", 1)

        with pytest.raises(redis_py.exceptions.ReadOnlyError):
            broker.promote(broker.groups[0], 1_000)


def test_many_promoters_at_once_move_each_payload_once(broker, redis):
    redis.zadd("wakaq:eta:high", {f"p{i}": i for i in range(5_000)})
    moved = []

    def promote():
        while count := broker.promote(broker.groups[0], 100)[0]:
            moved.append(count)

    threads = [threading.Thread(target=promote) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sum(moved) == 5_000
    assert sorted(redis.lrange("wakaq:high", 0, -1)) == sorted(b"p%d" % i for i in range(5_000))
    broker.client.connection_pool.disconnect()


def test_a_pass_costs_the_same_with_ten_as_with_a_hundred_thousand_delayed(broker, redis):
    def seconds(count):
        redis.delete("wakaq:eta:high")
        pairs = {f"p{i}": 9e9 + i for i in range(count)}
        redis.zadd("wakaq:eta:high", pairs)
        times = []
        for _ in range(200):
            began = time.perf_counter()
            broker.promote(broker.groups[0], 1_000)
            times.append(time.perf_counter() - began)
        return min(times)  # what others on the machine take is not counted

    seconds(10)
    few, many = seconds(10), seconds(100_000)

    # To look at each of them would take a hundred times as long.
    assert many < 5 * few


# -- fire ------------------------------------------------------------------------------------------


def test_a_tick_is_enqueued_once_and_remembered(broker, redis):
    queue = broker.queues[0]
    redis.rpush("wakaq:high", "x")

    assert broker.fire(queue, "daily-1", 1_800_000_000.0, b"a", 600)
    assert not broker.fire(queue, "daily-1", 1_800_000_000.0, b"a", 600)
    assert contents(redis) == {
        "wakaq:high": [b"x", b"a"],
        "wakaq:cron:high:daily-1": b"1800000000.000000",
    }
    assert 590 < redis.ttl("wakaq:cron:high:daily-1") <= 600


def test_later_ticks_and_other_schedules_are_enqueued_and_earlier_ticks_are_not(broker, redis):
    high, low = broker.queues

    fired = [
        broker.fire(*call, b"a", 600)
        for call in [
            (high, "x", 100.0),
            (high, "x", 102.0),
            (high, "x", 101.0),
            (high, "y", 100.0),
            (low, "x", 100.0),
        ]
    ]

    assert fired == [True, True, False, True, True]
    assert redis.llen("wakaq:high") == 3
    assert redis.llen("wakaq:low") == 1


def test_a_tick_that_cannot_be_enqueued_is_not_remembered(broker, redis):
    redis.set("wakaq:high", "no list")

    with pytest.raises(redis_py.ResponseError, match="WRONGTYPE"):
        broker.fire(broker.queues[0], "x", 100.0, b"a", 600)

    assert contents(redis) == {"wakaq:high": b"no list"}
    redis.delete("wakaq:high")
    assert broker.fire(broker.queues[0], "x", 100.0, b"a", 600)


def test_a_remembered_tick_that_someone_overwrote_counts_as_none(broker, redis):
    redis.set("wakaq:cron:high:x", "garbage")

    assert broker.fire(broker.queues[0], "x", 100.0, b"a", 600)


def test_many_schedulers_at_once_enqueue_each_tick_once(broker, redis):
    fired = []

    def fire():
        fired.extend(
            tick for tick in range(300) if broker.fire(broker.queues[0], "x", tick, b"a", 600)
        )

    threads = [threading.Thread(target=fire) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    # One that is behind may not enqueue what others have passed: so none is enqueued twice, and all
    # are if all go in order.
    assert sorted(fired) == list(range(300))
    assert redis.llen("wakaq:high") == 300
    broker.client.connection_pool.disconnect()


def test_the_clock_is_the_servers(broker, redis):
    seconds, microseconds = redis.time()

    assert broker.time() == pytest.approx(seconds + microseconds / 1e6, abs=1)
