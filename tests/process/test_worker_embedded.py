"""`wakaq-worker --embedded`: the server is there before the first worker, gone after the last."""

import contextlib
import signal
import socket

import pytest

APP = """
import os
import time
from wakaq import WakaQ

wakaq = WakaQ(queues=["default"], url=os.environ["REDIS_URL"], concurrency=1)


@wakaq.task
def nap(seconds):
    wakaq.broker.client.rpush("started", 1)
    time.sleep(seconds)
"""


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def url(port):
    return f"redis://127.0.0.1:{port}"


def test_what_runs_at_the_end_is_still_acked_and_kept(start, url, eventually, tmp_path):
    worker = start(APP, "worker", "--embedded", url=url)
    client = worker.app.wakaq.broker.client
    eventually(client.ping, within=10)
    worker.app.nap.delay(0.5)
    assert client.blpop("started", timeout=10)

    assert worker.stop() == 0
    with pytest.raises(ConnectionError), socket.create_connection(worker_address(url)):
        pass

    again = start(worker.app, "worker", "--embedded", url=url)
    eventually(client.ping, within=10)
    assert client.hget("wakaq:stats:default", "done") == b"1"
    assert (tmp_path / ".wakaq" / "appendonlydir").is_dir()
    assert again.workers()
    assert again.stop() == 0


def test_a_signal_while_it_starts_leaves_no_server_behind(start, url, eventually):
    worker = start(APP, "worker", "--embedded", url=url)
    eventually(worker.app.wakaq.broker.client.ping, within=10)

    # 143 if no handler of the supervisor was there yet.
    assert worker.stop(signal.SIGTERM) in {0, 143}


def test_a_port_that_something_else_uses_is_one_line(start, port, url):
    with contextlib.closing(socket.create_server(("127.0.0.1", port))) as listener:
        listener.settimeout(10)
        command = start(APP, "worker", "--embedded", url=url)
        listener.accept()[0].close()

        assert command.wait() == 2
    assert command.log.startswith(f"wakaq: what answers at 127.0.0.1:{port} is not the app's")
    assert command.log.count("\n") == 1


def test_a_redis_on_another_machine_is_refused(start):
    command = start(APP, "worker", "--embedded", url="redis://192.0.2.1:6379")

    assert command.wait() == 2
    assert "--embedded serves this machine only" in command.log


def worker_address(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("redis://").partition(":")
    return host, int(port)
