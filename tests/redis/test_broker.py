"""What producers and idle supervisors do to the database, and where connections lead."""

import contextlib
import socket
import threading
from dataclasses import replace

import pytest
import redis as redis_py

from wakaq import ConfigError, WakaQ
from wakaq.message import Call
from wakaq.queue import Queue
from wakaq.store.broker import Broker
from wakaq.store.keys import Keys

HIGH, LOW, HEAD = "wakaq:high", "wakaq:low", "wakaq:head:low"


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

    assert keys.of(queue).queue == "wakaq:emails"
    assert keys.of(queue).eta == "wakaq:eta:emails"
    assert keys.of(queue).dead == "wakaq:dead:emails"
    assert keys.of(queue).stats == "wakaq:stats:emails"
    assert keys.broadcast == "wakaq-broadcast"


def test_keys_of_supervisors_name_the_queue_and_the_id():
    keys, queue = Keys("wakaq"), Queue("emails")
    (group,) = keys.groups([queue])

    assert keys.of(queue).head == "wakaq:head:emails"
    assert keys.inflight(queue, "id") == "wakaq:inflight:emails:id"
    assert (group.registry, group.turns) == ("wakaq:registry:workers", "wakaq:registry:turns")


def test_a_queue_may_have_a_prefix_of_its_own():
    queue = Queue("emails", prefix="shop")

    assert Keys("wakaq").of(queue).queue == "shop:emails"
    assert Keys("wakaq").inflight(queue, "id") == "shop:inflight:emails:id"


def test_on_one_server_all_queues_are_one_group_in_order(broker, two_queues):
    (group,) = broker.groups

    assert group.queues == tuple(two_queues.queues)


# -- idle supervisors ------------------------------------------------------------------------------


def test_a_wake_up_moves_the_first_payload_to_the_end_of_the_head(broker, low, redis, database):
    redis.rpush(HEAD, "a")
    redis.rpush(LOW, "b", "c")

    assert broker.wait_for_work(low)
    assert database() == {HEAD: ["a", "b"], LOW: ["c"]}


def test_who_waits_for_nothing_is_told_so(broker, low, database):
    assert not broker.wait_for_work(low)
    assert database() == {}


def test_who_waits_gets_what_comes(broker, low, redis, eventually):
    woken = []
    thread = threading.Thread(target=lambda: woken.append(broker.wait_for_work(low)))
    broker.settings = replace(broker.settings, wait_timeout=10.0)
    thread.start()
    eventually(lambda: redis.info("clients")["blocked_clients"] == 1)
    broker.enqueue(low, b"a")
    thread.join()

    assert woken == [True]
    assert redis.lrange(HEAD, 0, -1) == [b"a"]


def test_the_last_of_a_head_is_put_back_to_the_front(broker, low, redis, database):
    redis.rpush(HEAD, "a", "b")
    redis.rpush(LOW, "c")
    broker.put_head_back(low)
    assert database() == {HEAD: ["a"], LOW: ["b", "c"]}
    broker.put_head_back(low)
    broker.put_head_back(low)

    assert database() == {LOW: ["a", "b", "c"]}


@pytest.mark.parametrize("broken", [LOW, HEAD])
def test_a_key_of_a_wrong_type_is_told_to_who_waits(broker, low, redis, database, broken):
    redis.rpush(LOW, "a")
    redis.delete(broken)
    redis.set(broken, "text")
    before = database()
    with pytest.raises(redis_py.ResponseError, match="WRONGTYPE"):
        broker.wait_for_work(low)

    assert database() == before


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


def test_one_refusal_is_not_logged_with_every_call(broker, caplog):
    for _ in range(3):
        broker.report_refusal("wakaq:low: WRONGTYPE")

    assert caplog.text.count("WRONGTYPE") == 1


def test_a_broker_closes_all_connections_it_made(app_url):
    app = WakaQ(queues=["low"], url=app_url)
    with contextlib.closing(Broker(app.settings, app.queues)) as broker:
        broker.ping()
        broker.enqueue(app.queues[0], b"a")
    # What is left open is found by the check after each test.
