"""What producers, supervisors and rescuers do to the database, except turns, and what waits for its time."""

import contextlib
import socket
import threading

import pytest
import redis as redis_py

from wakaq import ConfigError, WakaQ
from wakaq.broker import Broker
from wakaq.client import Wire
from wakaq.keys import Keys
from wakaq.message import Call
from wakaq.queue import Queue

REGISTRY, TURNS = "wakaq:registry:workers", "wakaq:registry:turns"
HIGH, LOW = "wakaq:high", "wakaq:low"
LANE = "wakaq:inflight:low:me:1"


@pytest.fixture
def broker(two_queues):
    return two_queues.broker


@pytest.fixture
def low(two_queues):
    return two_queues.queues[1]


# -- producers -------------------------------------------------------------------------------------


def test_payloads_are_appended_to_their_queue(broker, two_queues, database):
    high, low = two_queues.queues
    broker.enqueue(low, b"a")
    broker.enqueue(high, b"b")
    broker.enqueue(low, b"c")

    assert database() == {LOW: ["a", "c"], HIGH: ["b"]}


def test_many_calls_go_in_order_and_in_pages(broker, two_queues, database):
    high, low = two_queues.queues
    calls = [Call((high, low)[number % 2], b"%d" % number) for number in range(5_000)]
    broker.enqueue_all([*calls, Call(low, b"later", at=5.0)])

    assert database() == {
        HIGH: [str(number) for number in range(0, 5_000, 2)],
        LOW: [str(number) for number in range(1, 5_000, 2)],
        "wakaq:eta:low": {"later": 5.0},
    }


def test_no_calls_need_no_connection(broker):
    broker.enqueue_all([])

    assert broker.client.connection_pool._available_connections == []


def test_a_key_of_a_wrong_type_is_told_to_the_caller_who_may_go_on(broker, two_queues, redis):
    high, low = two_queues.queues
    redis.set(LOW, "text")
    with pytest.raises(redis_py.ResponseError, match="WRONGTYPE"):
        broker.enqueue(low, b"a")
    broker.enqueue(high, b"b")

    assert redis.lrange(HIGH, 0, -1) == [b"b"]


def test_many_threads_may_enqueue_at_once(broker, low, redis):
    def send(number):
        for _ in range(200):
            broker.enqueue(low, b"%d" % number)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    payloads = redis.lrange(LOW, 0, -1)
    assert [payloads.count(b"%d" % number) for number in range(5)] == [200] * 5


def test_a_connection_that_was_closed_while_idle_is_replaced_unnoticed(broker, low, redis):
    broker.enqueue(low, b"a")
    redis.client_kill_filter(_type="normal", skipme=True)
    broker.enqueue(low, b"b")

    assert redis.lrange(LOW, 0, -1) == [b"a", b"b"]


def test_a_refused_connection_is_an_error_at_once():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        app = WakaQ(queues=["low"], url=f"redis://127.0.0.1:{probe.getsockname()[1]}")
        with pytest.raises(redis_py.ConnectionError):
            app.broker.enqueue(app.queues[0], b"a")


def test_host_port_and_db_or_a_url_lead_to_the_server(redis_tcp_server):
    port = redis_tcp_server.port
    by_parts = WakaQ(queues=["low"], host="127.0.0.1", port=port, password="s3cret", db=3)
    by_url = WakaQ(queues=["low"], url=f"{redis_tcp_server.url}/3", host="elsewhere")
    with contextlib.closing(by_parts.broker), contextlib.closing(by_url.broker):
        by_parts.broker.enqueue(by_parts.queues[0], b"a")
        assert by_url.broker.client.lrange(LOW, 0, -1) == [b"a"]
        by_url.broker.client.flushdb()


def test_a_url_that_cannot_be_used_is_a_config_error():
    app = WakaQ(queues=["low"], url="redis://localhost:no-port")
    with pytest.raises(ConfigError, match="url cannot be used"):
        app.broker  # noqa: B018 - it is made when it is first asked for


# -- keys ------------------------------------------------------------------------------------------


def test_keys_are_those_that_the_siblings_use():
    keys, queue = Keys("wakaq"), Queue("emails")

    assert keys.of(queue) == (
        "wakaq:emails",
        "wakaq:eta:emails",
        "wakaq:dead:emails",
        "wakaq:stats:emails",
    )
    assert keys.inflight(queue, "id", 3) == "wakaq:inflight:emails:id:3"
    assert keys.broadcast == "wakaq-broadcast"
    assert keys.registry == REGISTRY
    assert keys.turns == TURNS


def test_a_queue_may_have_a_prefix_of_its_own():
    queue = Queue("emails", prefix="shop")

    assert Keys("wakaq").of(queue).queue == "shop:emails"
    assert Keys("wakaq").inflight(queue, "id", 0) == "shop:inflight:emails:id:0"


# -- supervisors -----------------------------------------------------------------------------------


def test_a_supervisor_registers_beats_and_leaves(broker, database):
    broker.register("me", {"beat": 0})
    assert database() == {REGISTRY: {"me": '{"beat": 0}'}, TURNS: {"me": "0"}}
    assert broker.beat("me", {"beat": 1})
    assert broker.registry() == {"me": b'{"beat": 1}'}
    broker.unregister("me")

    assert database() == {}


def test_a_beat_of_one_that_was_buried_changes_nothing(broker, database):
    assert not broker.beat("me", {"beat": 1})
    assert database() == {}


def test_a_dead_one_is_fenced_off_and_leaves_a_tombstone(broker, database):
    broker.register("me", {"beat": 7})
    broker.register("other", {"beat": 1})
    assert broker.bury("me", "dead:me", b'{"beat": 7}')

    assert database() == {
        REGISTRY: {"dead:me": '{"beat": 7}', "other": '{"beat": 1}'},
        TURNS: {"other": "0"},
    }
    broker.forget("dead:me")
    assert list(broker.registry()) == ["other"]


@pytest.mark.parametrize("entry", [b'{"beat": 6}', b""])
def test_one_that_has_moved_meanwhile_is_not_buried(broker, database, entry):
    broker.register("me", {"beat": 7})
    before = database()

    assert not broker.bury("me", "dead:me", entry)
    assert database() == before


def test_inflight_shows_the_last_turn_and_what_lanes_hold(broker, redis, lanes):
    assert broker.inflight("me", lanes()) == (None, [[], []])
    redis.hset(TURNS, "me", 12)
    redis.rpush(LANE, "a", "b")

    assert broker.inflight("me", lanes()) == (12, [[], [b"a", b"b"]])


def test_a_lane_of_a_wrong_type_is_logged_and_counts_as_empty(broker, redis, lanes, caplog):
    redis.hset(TURNS, "me", 12)
    redis.set(LANE, "text")
    redis.rpush("wakaq:inflight:high:me:1", "a")

    assert broker.inflight("me", lanes()) == (12, [[b"a"], []])
    assert LANE in caplog.text
    assert "WRONGTYPE" in caplog.text


def test_a_claim_that_waits_gets_what_comes(broker, low, redis, lanes):
    lane = lanes(0)[1]
    with contextlib.closing(Wire(broker.client)) as wire:
        broker.begin_claim(wire, lane)
        assert wire.receive() is None
        broker.begin_claim(wire, lane)
        broker.enqueue(low, b"a")
        assert wire.receive() == b"a"
    assert redis.lrange(lane.key, 0, -1) == [b"a"]


# -- what may go wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "limit", "risk"),
    [
        ("noeviction", 10**9, None),
        ("allkeys-lru", 0, None),
        ("allkeys-lru", 10**9, "allkeys-lru"),
        ("volatile-ttl", 10**9, "volatile-ttl"),
    ],
)
def test_a_server_that_may_throw_tasks_away_is_found_out(broker, redis, policy, limit, risk):
    redis.config_set("maxmemory-policy", policy)
    redis.config_set("maxmemory", limit)
    try:
        assert broker.risk_of_eviction() == risk
    finally:
        redis.config_set("maxmemory", 0)
        redis.config_set("maxmemory-policy", "noeviction")


def test_one_complaint_is_not_repeated_with_every_call(broker, caplog):
    for _ in range(3):
        broker.complain("wakaq:low: WRONGTYPE")

    assert caplog.text.count("WRONGTYPE") == 1


def test_a_broker_closes_all_connections_it_made(app_url):
    app = WakaQ(queues=["low"], url=app_url)
    with contextlib.closing(Broker(app.settings, app.queues)) as broker:
        broker.ping()
        broker.enqueue(app.queues[0], b"a")
    # What is left open is found by the check after each test.


def test_a_look_at_what_is_in_flight_leaves_no_connection_open(broker, redis, eventually):
    broker.ping()
    before = len(redis.client_list())

    assert broker.inflight("me", []) == (None, [])
    eventually(lambda: len(redis.client_list()) == before - 1)
