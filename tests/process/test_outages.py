"""Redis restarted, killed, read-only, full, loading, slow, or cut off.

Nothing exits, and everything resumes.
"""

import contextlib
import importlib.util
import re
import socket
import socketserver
import threading
import time
from pathlib import Path

import pytest
import redis as redis_py

from wakaq import Queue, WakaQ
from wakaq.store.connection import is_outage

APP = """
import functools, os, sys, time
from wakaq import WakaQ
import wakaq.store.registry, wakaq.supervisor.lease, wakaq.supervisor.supervisor

if "pytest" not in sys.modules:  # this is a command of the test
    wakaq.supervisor.supervisor.SETTLE_GRACE = 1.0
    term = float(os.environ.get("LEASE", "15"))
    wakaq.supervisor.supervisor.Lease = functools.partial(wakaq.supervisor.lease.Lease, term=term)
    wakaq.supervisor.dispatcher.BEAT = min(1.0, term / 5)
    if "LEASE" in os.environ:  # each on a machine of its own
        wakaq.store.registry.host_identity = lambda: str(os.getpid())

wakaq = WakaQ(
    queues=["default"], concurrency=2, url=os.environ["REDIS_URL"], wait_timeout=0.2,
    socket_timeout=0.7,
)

def mark(name):
    with open("ran", "ab", buffering=0) as file:
        file.write(f"{name}\\n".encode())

@wakaq.task
def note(name, seconds=0):
    time.sleep(seconds)
    mark(name)
"""
DURABLE = ("--appendonly", "yes", "--appendfsync", "always")
COMMAND = re.compile(rb"\*\d+\r\n")
AWAY, BACK = "Redis is away", "Redis is back"
_spec = importlib.util.spec_from_file_location(
    "chaos_proxy", Path(__file__).parent.parent / "chaos" / "proxy.py"
)
proxy_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(proxy_module)


@pytest.fixture
def ran(tmp_path, eventually):
    """`ran(names)` waits until these tasks ran, none of them more often than it is named."""

    def check(names, within=10):
        def read():
            path = tmp_path / "ran"
            assert sorted(path.read_text().split() if path.exists() else []) == sorted(names)

        eventually(read, within=within)

    return check


@pytest.fixture
def serve(start, make_server):
    """`serve(*options, tcp=False)` starts a server of the test's own, with a worker."""

    def make(*options, **more):
        server = make_server(*options, **more)
        worker = start(APP, url=server.url)
        worker.workers(2)
        return server, worker

    return make


def assert_empty(server):
    with contextlib.closing(server.client()) as client:
        assert client.keys("wakaq:inflight:*") == []
        assert client.llen("wakaq:default") == 0


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_everything_resumes_when_redis_is_restarted(serve, ran, eventually, how):
    server, worker = serve(*DURABLE)
    pids = worker.workers(2)
    worker.app.note.delay("before", 0.5)
    worker.app.note.delay("running", 2)
    ran(["before"])
    getattr(server, how)()
    eventually(lambda: AWAY in worker.log)
    server.start()
    back_at = time.monotonic()
    worker.app.note.delay("after")
    ran(["before", "after"], within=3)
    assert time.monotonic() - back_at < 2
    ran(["before", "after", "running"])
    eventually(lambda: BACK in worker.log, within=8)

    assert worker.workers(2) == pids
    assert worker.log.count(AWAY) == worker.log.count(BACK) == 1
    assert worker.stop() == 0
    assert_empty(server)


def test_what_was_done_while_redis_was_away_is_acked_afterwards(serve, ran, eventually):
    server, worker = serve(*DURABLE)
    for name in "ab":
        worker.app.note.delay(name, 0.5)
    with contextlib.closing(server.client()) as client:
        eventually(lambda: client.llen("wakaq:default") == 0)
    server.stop()
    ran(["a", "b"])
    server.start()
    with contextlib.closing(server.client()) as client:
        eventually(lambda: client.hget("wakaq:stats:default", "done") == b"2")

    assert worker.stop() == 0
    ran(["a", "b"])
    assert_empty(server)


def test_a_server_that_became_a_replica_is_an_outage_until_it_is_a_primary_again(
    serve, ran, eventually
):
    server, worker = serve()
    worker.app.note.delay("before")
    ran(["before"])
    with contextlib.closing(server.client()) as client:
        client.replicaof("127.0.0.1", "1")
        eventually(lambda: AWAY in worker.log)
        with pytest.raises(redis_py.exceptions.ReadOnlyError):
            worker.app.note.delay("refused")
        client.replicaof("NO", "ONE")
    worker.app.note.delay("after")
    ran(["before", "after"])
    eventually(lambda: BACK in worker.log, within=8)

    assert worker.log.count(AWAY) == worker.log.count(BACK) == 1
    assert "Traceback" not in worker.log
    assert worker.stop() == 0


def test_a_full_server_refuses_new_tasks_and_still_has_the_old_ones_run_and_acked(
    serve, ran, eventually
):
    server, worker = serve()
    names = [f"{number:02}" for number in range(40)]
    with contextlib.closing(server.client()) as client:
        for name in names:
            worker.app.note.delay(name, 0.1)
        client.config_set("maxmemory", 1)
        with pytest.raises(redis_py.exceptions.OutOfMemoryError):
            worker.app.note.delay("refused")
        ran(names)
        eventually(lambda: client.hget("wakaq:stats:default", "done") == b"40")
        eventually(lambda: AWAY in worker.log)
        client.config_set("maxmemory", 0)
    worker.app.note.delay("after")
    ran([*names, "after"])
    eventually(lambda: BACK in worker.log, within=8)

    assert worker.log.count(AWAY) == worker.log.count(BACK) == 1
    assert worker.stop() == 0
    assert_empty(server)


def test_a_server_that_loads_its_data_is_waited_for(serve, ran):
    server, worker = serve(*DURABLE)
    with contextlib.closing(server.client()) as client:
        client.mset({f"other:{number}": "x" for number in range(10)})
        for number in range(3_000):
            client.set("other", number)
    server.kill()
    server._options += ["--key-load-delay", "500"]
    server.start()
    worker.app.note.delay("after")
    ran(["after"])

    assert "loading" in (server.directory / "server.log").read_text().lower()
    assert worker.stop() == 0


def test_scripts_that_the_server_forgot_are_sent_again(serve, ran):
    server, worker = serve()
    names = [str(number) for number in range(60)]
    with contextlib.closing(server.client()) as client:
        for name in names:
            worker.app.note.delay(name, 0.01)
            client.script_flush()
    ran(names)

    assert worker.stop() == 0
    assert_empty(server)


@pytest.mark.parametrize("seconds", [0.4, 1.5])
def test_a_server_that_stalls_loses_and_doubles_nothing(serve, ran, eventually, seconds):
    server, worker = serve()
    names = [f"{number:03}" for number in range(300)]
    with contextlib.closing(server.client()) as client:
        for start in range(0, 300, 100):
            with worker.app.wakaq.batch():
                for name in names[start : start + 100]:
                    worker.app.note.delay(name, 0.002)
            client.client_pause(int(seconds * 1000))  # at some moment among the claims
            ran(names[: start + 100], within=15)
    with contextlib.closing(server.client()) as client:
        eventually(lambda: client.hget("wakaq:stats:default", "done") == b"300")

    assert worker.stop() == 0
    ran(names)
    assert_empty(server)


def test_replies_that_are_cut_off_lose_and_double_nothing(start, make_server, ran, eventually):
    server = make_server(tcp=True)
    names = [f"{number:04}" for number in range(1_000)]
    with proxy_module.Proxy(("127.0.0.1", server.port)) as proxy:
        worker = start(APP, url=f"redis://127.0.0.1:{proxy.port}")
        worker.workers(2)
        with contextlib.closing(server.client()) as client:
            for number, name in enumerate(names):
                message = f'{{"name": "note", "args": ["{name}", 0.001], "kwargs": {{}}}}'
                client.rpush("wakaq:default", message)
                if number % 100 == 50:
                    proxy.cut_after(97 * (number // 100) + 1)
            ran(names, within=15)
            eventually(lambda: client.hget("wakaq:stats:default", "done") == b"1000")
        assert worker.stop() == 0
        worker.app.wakaq.broker.close()
    ran(names)
    assert_empty(server)


def test_a_supervisor_is_stopped_in_an_outage_and_what_it_had_is_rescued(
    serve, start, ran, eventually
):
    server, worker = serve(*DURABLE)
    worker.app.note.delay("a", 0.5)
    with contextlib.closing(server.client()) as client:
        eventually(lambda: client.llen("wakaq:default") == 0)
    server.kill()
    assert worker.stop(within=19) == 0
    assert "left to rescuers" in worker.log
    server.start()
    again = start(worker.app, url=server.url)
    worker.app.note.delay("b")

    ran(["a", "a", "b"])  # nobody could be told that it was done
    assert again.stop() == 0
    assert_empty(server)


def test_connections_that_fall_silent_are_replaced(start, make_server, ran, eventually):
    server = make_server(tcp=True)
    with proxy_module.Proxy(("127.0.0.1", server.port)) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}"
        worker = start(
            APP.replace("wait_timeout", "health_check_interval=0.5, wait_timeout"), url=url
        )
        worker.workers(2)
        with contextlib.closing(server.client()) as client:

            def listener():
                return next(c["id"] for c in client.client_list(_type="pubsub"))

            before = eventually(listener)
            proxy.freeze()
            client.rpush("wakaq:default", '{"name": "note", "args": ["a"]}')
            ran(["a"], within=4)
            eventually(lambda: listener() != before)
            client.publish("wakaq-broadcast", '{"name": "note", "args": ["b"]}')
            ran(["a", "b"], within=2)
        assert worker.stop() == 0
        worker.app.wakaq.broker.close()
    assert_empty(server)


@pytest.fixture
def outlive(start, make_server, monkeypatch, ran, eventually):
    """`outlive(supervisors, lease, seconds)` takes Redis away, and nobody is taken for dead."""

    def run(count, lease, seconds):
        monkeypatch.setenv("LEASE", str(lease))
        server = make_server(*DURABLE)
        workers = [start(APP, url=server.url)]
        workers += [start(workers[0].app, url=server.url) for _ in range(count - 1)]
        for worker in workers:
            worker.workers(2, within=30)
            workers[0].app.note.delay("long", seconds + 2)
        with contextlib.closing(server.client()) as client:
            eventually(lambda: client.llen("wakaq:default") == 0)
        server.stop()
        time.sleep(seconds)  # the subject: how long it is away
        server.start()
        ran(["long"] * count, within=seconds + 10)
        with contextlib.closing(server.client()) as client:
            done = str(count).encode()
            eventually(lambda: client.hget("wakaq:stats:default", "done") == done)
        for worker in workers:
            assert worker.stop() == 0
            assert " dead" not in worker.log
            assert "Rescued" not in worker.log
            assert worker.log.count(AWAY) == 1
        assert_empty(server)

    return run


def test_supervisors_do_not_rob_each_other_after_an_outage_of_many_leases(outlive):
    outlive(3, lease=0.5, seconds=3)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_eight_supervisors_do_not_rob_each_other_after_two_minutes(outlive):
    outlive(8, lease=15, seconds=120)


# -- producers -------------------------------------------------------------------------------------


def app_at(**options):
    app = WakaQ(queues=[Queue("default")], **options)

    @app.task
    def nothing(): ...

    return app, nothing


def test_delay_raises_at_once_where_the_connection_is_refused(tmp_path):
    app, nothing = app_at(url=f"unix://{tmp_path}/nobody.sock", socket_timeout=5)
    before = time.monotonic()
    with pytest.raises(redis_py.ConnectionError):
        nothing.delay()

    assert time.monotonic() - before < 0.5
    app.broker.close()


def test_delay_raises_within_socket_timeout_where_nothing_answers():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        app, nothing = app_at(host="127.0.0.1", port=port, socket_timeout=1.2)
        before = time.monotonic()
        with pytest.raises(redis_py.TimeoutError):
            nothing.delay()
        took = time.monotonic() - before
        app.broker.close()

    assert 1.0 < took < 1.8


def test_delay_is_no_error_after_the_server_was_restarted(make_server):
    server = make_server(*DURABLE)
    app, nothing = app_at(url=server.url)
    nothing.delay()
    server.stop()
    with pytest.raises(redis_py.ConnectionError):
        nothing.delay()
    server.start()
    nothing.delay()
    server.stop()
    server.start()
    nothing.delay()
    app.broker.close()

    with contextlib.closing(server.client()) as client:
        assert client.llen("wakaq:default") == 3


@pytest.mark.parametrize(
    ("word", "heals"), [("READONLY", True), ("OOM", True), ("WRONGTYPE", False)]
)
def test_what_redis_6_says_of_a_script_is_understood(word, heals):
    refusal = f"-ERR Error running script (call to f_1): @user_script:2: -{word} as it says\r\n"

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            while data := self.request.recv(1 << 16):
                is_script = b"EVALSHA" in data
                reply = refusal.encode() if is_script else b"+OK\r\n" * len(COMMAND.findall(data))
                self.request.sendall(reply)

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        app, _ = app_at(host="127.0.0.1", port=server.server_address[1], health_check_interval=0)
        with pytest.raises(redis_py.ResponseError) as caught:
            app.broker.run_script("turn", ["turns"], ["me", 1, "", 0, 1])
        app.broker.close()
        server.shutdown()
        thread.join()

    assert is_outage(caught.value) is heals


# -- what may throw tasks away ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "is_reported"),
    [
        (("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"), True),
        (("--maxmemory", "100mb", "--maxmemory-policy", "volatile-ttl"), True),
        (("--maxmemory", "100mb", "--maxmemory-policy", "noeviction"), False),
        (("--maxmemory", "0", "--maxmemory-policy", "allkeys-lru"), False),
        (("--maxmemory", "9mb", "--rename-command", "CONFIG", ""), False),
    ],
)
def test_a_server_that_may_throw_tasks_away_is_reported_at_the_start(serve, options, is_reported):
    _, worker = serve(*options)

    warning = f"maxmemory-policy is {options[-1]}, set noeviction"
    assert (warning in worker.log) is is_reported
    assert worker.log.count("\n") == 1 + is_reported
    assert worker.stop() == 0
