"""Producers and workers of WakaQ 2 and 3, as they are on PyPI, on one Redis with ours.

Tasks go both ways.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180)]

# The same file on both sides; each has the same name and so enqueues the same payloads.
SHOP = """
import os
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal

import redis
from wakaq import WakaQ

address = {"host": "127.0.0.1", "port": int(os.environ["SHOP_PORT"]), "password": "s3cret"}
wakaq = WakaQ(queues=[(0, "high"), (1, "low")], concurrency=1, wait_timeout=1, **address)


@wakaq.after_worker_started
def tell():
    redis.Redis(**address).rpush("started", 1)


@wakaq.task(queue="high")
def echo(*args, **kwargs):
    redis.Redis(**address).rpush("echo", repr((args, sorted(kwargs.items()))))


def send(how):
    args = [
        Decimal("1.10"), date(2024, 2, 29), datetime(2024, 2, 29, 1, 2, 3, 456789, fold=1),
        datetime(2024, 2, 29, 23, tzinfo=timezone(timedelta(hours=-3))),
        timedelta(days=-1, microseconds=7), b"\\0\\xff", None, True, 1.5, 2**40,
        "\\u00e9 \\U0001f600\\n", (1, [2]),
        {"a": {"b": Decimal("-0")}}, {"only"}, [], {},
    ]
    kwargs = {"when": datetime(2030, 1, 1), "raw": b"", "names": ["x"]}
    if how == "broadcast":
        return echo.broadcast(*args, **kwargs)
    options = {"plain": {}, "low": {"queue": "low"}, "delayed": {"eta": timedelta(seconds=1)}}
    return echo.delay(*args, **kwargs, **options[how])
"""
# A few of them arrive as something else: aware as naive UTC, tuples and sets as lists.
RECEIVED = """((Decimal('1.10'), datetime.date(2024, 2, 29), \
datetime.datetime(2024, 2, 29, 1, 2, 3, 456789, fold=1), datetime.datetime(2024, 3, 1, 2, 0), \
datetime.timedelta(days=-1, microseconds=7), b'\\x00\\xff', None, True, 1.5, 1099511627776, \
'é 😀\\n', [1, [2]], {'a': {'b': Decimal('-0')}}, ['only'], [], {}), \
[('names', ['x']), ('raw', b''), ('when', datetime.datetime(2030, 1, 1, 0, 0))])"""
WAYS = ["plain", "low", "delayed"]


class Sibling:
    """An environment with a published release, and the application in it."""

    def __init__(self, environment: Path, folder: Path, port: int) -> None:
        self._bin = environment / "bin"
        self._folder = folder
        self._environment = {"SHOP_PORT": str(port), "PATH": os.environ["PATH"]}

    def send(self, how: str) -> None:
        program = f"import shop; shop.send({how!r})"
        subprocess.run(
            [self._bin / "python", "-W", "ignore", "-c", program],
            cwd=self._folder,
            env=self._environment,
            check=True,
        )

    @contextlib.contextmanager
    def worker(self):
        with (self._folder / "sibling.log").open("wb") as log:
            process = subprocess.Popen(
                [self._bin / "wakaq-worker", "--app=shop.wakaq"],
                cwd=self._folder,
                env=self._environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            yield
        finally:
            # Its shutdown is not what we test.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="session", params=["2.1.25", "3.0.7"])
def environment(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("sibling")
    subprocess.run([sys.executable, "-m", "venv", path], check=True)
    # Both use options that redis-py has dropped since.
    wanted = [f"wakaq=={request.param}", "redis<6"]
    pip = [path / "bin" / "python", "-m", "pip", "install", "--quiet", "--retries=1", *wanted]
    result = subprocess.run(pip, check=False, capture_output=True, text=True, timeout=150)
    if result.returncode:
        pytest.skip(f"pip cannot install {wanted[0]}: {result.stderr.strip()[-300:]}")
    return path


@pytest.fixture
def redis(redis_tcp_server):
    with contextlib.closing(redis_tcp_server.client()) as client:
        client.flushall()
        yield client


@pytest.fixture
def ours(load_app, redis_tcp_server, monkeypatch):
    monkeypatch.setenv("SHOP_PORT", str(redis_tcp_server.port))
    return load_app(SHOP, name="shop")


@pytest.fixture
def sibling(environment, ours, tmp_path, redis_tcp_server):  # noqa: ARG001 - `ours` writes the file
    return Sibling(environment, tmp_path, redis_tcp_server.port)


def received(redis) -> str:
    popped = redis.blpop("echo", timeout=10)
    assert popped, redis.keys()
    return popped[1].decode()


@pytest.mark.parametrize("how", WAYS)
def test_our_worker_runs_what_a_sibling_enqueued(redis, start, ours, sibling, how):
    worker = start(ours)
    sibling.send(how)

    assert received(redis) == RECEIVED
    assert worker.stop() == 0
    assert not redis.exists("echo")


@pytest.mark.parametrize("how", WAYS)
def test_a_siblings_worker_runs_what_we_enqueued(redis, ours, sibling, how):
    with sibling.worker():
        ours.send(how)

        assert received(redis) == RECEIVED


def test_broadcasts_reach_supervisors_of_both(redis, start, ours, sibling, eventually):
    worker = start(ours)
    with sibling.worker():
        eventually(lambda: redis.pubsub_numsub("wakaq-broadcast")[0][1] == 2, within=10)
        assert redis.blpop("started", timeout=10)
        assert redis.blpop("started", timeout=10)

        assert ours.send("broadcast") == 2
        assert [received(redis) for _ in range(2)] == [RECEIVED] * 2

        sibling.send("broadcast")
        assert [received(redis) for _ in range(2)] == [RECEIVED] * 2
    assert worker.stop() == 0
    assert not redis.exists("echo")


def test_the_same_delayed_call_of_both_is_one_call(redis, ours, sibling):
    ours.send("delayed")
    sibling.send("delayed")

    assert redis.zcard("wakaq:eta:high") == 1


def test_both_find_the_same_tasks_in_the_same_keys(redis, ours, sibling):
    ours.send("plain")
    sibling.send("plain")
    first, second = (json.loads(payload) for payload in redis.lrange("wakaq:high", 0, -1))

    assert second.pop("retry") == 0  # which we leave out
    assert first == second
