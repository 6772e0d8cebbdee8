"""Broadcasts.

Once on each running `wakaq-worker`, whatever its workers do, and whichever of them dies.
"""

import contextlib
import os
import select
import signal
import socket
import threading

import pytest

APP = """
import asyncio, os, time
from wakaq import SoftTimeout, WakaQ

wakaq = WakaQ(
    queues=["default"], url=os.environ["REDIS_URL"], concurrency=CONCURRENCY, wait_timeout=0.2
)
client = wakaq.broker.client

@wakaq.task
def shout(word):
    client.rpush("done", f"{word} {os.getppid()}")  # the parent is the supervisor's fork server

@wakaq.task
async def whisper(word):
    client.rpush("done", f"{word} {os.getppid()}")

@wakaq.task
def nap(seconds, name="nap"):
    client.rpush("started", name)
    time.sleep(seconds)
    client.rpush("done", name)

@wakaq.task
async def doze(seconds):
    client.rpush("started", "doze")
    await asyncio.sleep(seconds)

@wakaq.task(soft_timeout=0.3, max_retries=1)
def dawdle():
    if client.incr("attempts") == 1:
        time.sleep(10)
    client.rpush("done", "dawdled")

@wakaq.task(max_retries=2, retry_on=ValueError, retry_delay=0.4)
def fail():
    client.rpush("done", repr(time.time()))
    raise ValueError

@wakaq.task
def crash():
    client.rpush("done", "crashing")
    os._exit(1)
"""
SINGLE, PAIR = (APP.replace("CONCURRENCY", str(count)) for count in (1, 2))


def take(redis, count, key="done", within=10):
    """Wait for the next `count` elements of a list."""
    found = []
    for _ in range(count):
        element = redis.blpop(key, timeout=within)
        assert element, f"only {found} of {count} came"
        found.append(element[1].decode())
    return found


def assert_ran_once_each(redis, workers, word):
    """Wait for a broadcast on each of these; after they have stopped nothing more may have come."""
    found = take(redis, len(workers))
    assert {line.split()[0] for line in found} == {word}
    assert len({line.split()[1] for line in found}) == len(workers)
    assert [worker.stop() for worker in workers] == [0] * len(workers)
    assert redis.llen("done") == 0


@pytest.fixture
def three(start):
    """Three supervisors of two workers each, which listen."""
    first = start(PAIR)
    workers = [first, start(first.app), start(first.app)]
    for worker in workers:
        worker.workers(2)
    return workers


@pytest.fixture
def listening(redis, eventually):
    """Return a function that waits until so many supervisors hear broadcasts."""

    def wait(count, client=redis):
        eventually(
            lambda: dict(client.pubsub_numsub("wakaq-broadcast")) == {b"wakaq-broadcast": count}
        )

    return wait


@pytest.mark.parametrize("task", ["shout", "whisper"])
def test_a_broadcast_runs_once_on_each_supervisor(three, redis, listening, task):
    listening(3)

    assert getattr(three[0].app, task).broadcast("hello") == 3
    assert_ran_once_each(redis, three, "hello")


def test_with_all_workers_busy_it_runs_when_the_first_is_free(three, redis, listening):
    app = three[0].app
    listening(3)
    for _ in range(6):
        app.nap.delay(0.7)
    take(redis, 6, "started")

    assert app.shout.broadcast("hello") == 3
    found = take(redis, 9)
    assert found.count("nap") == 6
    shouts = [line for line in found if line.startswith("hello")]
    assert len(set(shouts)) == 3
    assert [worker.stop() for worker in three] == [0, 0, 0]
    assert redis.llen("done") == 0


def test_when_the_chosen_worker_is_killed_before_it_starts_another_gets_it(
    three, redis, listening, eventually
):
    listening(3)
    stopped = three[0].workers(2)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)

    assert three[0].app.shout.broadcast("hello") == 3
    others = take(redis, 2)
    for pid in stopped:
        os.kill(pid, signal.SIGKILL)
    found = others + take(redis, 1)

    assert len({line.split()[1] for line in found}) == 3
    eventually(lambda: len(three[0].workers(2)) == 2)
    assert [worker.stop() for worker in three] == [0, 0, 0]
    assert redis.llen("done") == 0


def test_an_idle_worker_is_preferred(start, redis, listening):
    worker = start(PAIR)
    worker.workers(2)
    listening(1)
    worker.app.nap.delay(5)
    take(redis, 1, "started")

    worker.app.shout.broadcast("hello")

    assert take(redis, 1, within=2)[0].startswith("hello")
    assert worker.stop(signal.SIGQUIT) == 0


def test_it_runs_ahead_of_the_work_that_waits(start, redis, listening):
    worker = start(SINGLE)
    worker.workers()
    listening(1)
    worker.app.nap.delay(0.5, "first")
    take(redis, 1, "started")
    for number in range(20):
        worker.app.nap.delay(0, f"waiting {number}")

    worker.app.shout.broadcast("hello")

    names = take(redis, 3)
    assert names[0] == "first"
    assert names[1].startswith("hello")
    assert worker.stop() == 0


def test_it_does_not_wait_behind_a_long_task_in_a_worker_that_only_ended_an_async_one(
    start, redis, listening
):
    worker = start(PAIR)
    worker.workers(2)
    listening(1)
    worker.app.nap.delay(6, "long")
    worker.app.nap.delay(1, "short")
    for _ in range(4):
        worker.app.doze.delay(0.3)
    take(redis, 6, "started")

    worker.app.shout.broadcast("hello")

    names = take(redis, 2, within=3)
    assert names[0] == "short"
    assert names[1].startswith("hello")
    assert worker.stop(signal.SIGQUIT) == 0


def test_soft_timeout_and_retries_hold_for_it(start, redis, listening):
    worker = start(SINGLE)
    listening(1)

    worker.app.dawdle.broadcast()

    assert take(redis, 1) == ["dawdled"]
    assert redis.get("attempts") == b"2"
    assert worker.stop() == 0


def test_retries_wait_for_their_delay_and_end(start, redis, listening, eventually):
    worker = start(SINGLE)
    listening(1)

    worker.app.fail.broadcast()

    first, second, third = map(float, take(redis, 3))
    assert second - first >= 0.4
    assert third - second >= 0.4
    eventually(lambda: "Broadcast fail() is given up" in worker.log)
    assert redis.keys("wakaq:dead:*") == []
    assert worker.stop() == 0
    assert redis.llen("done") == 0


def test_one_that_takes_its_worker_down_ends_after_max_redeliveries(
    start, redis, listening, eventually
):
    worker = start(PAIR)
    listening(1)

    worker.app.crash.broadcast()

    assert take(redis, 4) == ["crashing"] * 4
    eventually(lambda: "Broadcast crash() is given up" in worker.log)
    eventually(lambda: len(worker.workers(2)) == 2)
    worker.app.shout.broadcast("hello")
    assert_ran_once_each(redis, [worker], "hello")


def test_without_a_worker_it_reaches_nobody(load_app):
    assert load_app(SINGLE).shout.broadcast("hello") == 0


def test_what_is_no_message_and_an_unknown_task_stop_nobody(start, redis, listening, eventually):
    worker = start(SINGLE)
    listening(1)

    redis.publish("wakaq-broadcast", b"\xff no message")
    redis.publish("wakaq-broadcast", b'{"name": "nope", "args": [], "kwargs": {}}')
    eventually(lambda: "no message" in worker.log)
    eventually(lambda: "Task nope is unknown" in worker.log)

    worker.app.shout.broadcast("hello")
    assert_ran_once_each(redis, [worker], "hello")


def test_a_call_that_does_not_fit_is_refused_and_nothing_is_sent(start, redis, listening):
    worker = start(SINGLE)
    listening(1)

    with pytest.raises(TypeError):
        worker.app.shout.broadcast()
    with pytest.raises(TypeError):
        worker.app.shout.broadcast("hello", queue="default")
    worker.app.shout.broadcast("later")
    assert_ran_once_each(redis, [worker], "later")


def test_the_listener_comes_back_when_its_connection_was_cut(start, redis, listening, eventually):
    worker = start(SINGLE)
    listening(1)
    (old,) = redis.client_list("pubsub")
    redis.client_kill_filter(_id=old["id"])

    def has_come_back():
        (new,) = redis.client_list("pubsub")
        assert new["id"] != old["id"]
        assert new["sub"] == "1"

    eventually(has_come_back)
    assert worker.app.shout.broadcast("hello") == 1
    assert_ran_once_each(redis, [worker], "hello")


def test_the_listener_comes_back_after_an_outage(start, make_server, listening):
    server = make_server()
    worker = start(SINGLE, url=server.url)
    with server.client() as client:
        listening(1, client)
        server.kill()
        server.start()
        listening(1, client)

        assert worker.app.shout.broadcast("hello") == 1
        assert_ran_once_each(client, [worker], "hello")


class Relay:
    """Passes connections on to a server, and those of the past no more when it is told to."""

    def __init__(self, upstream):
        self._upstream = upstream
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._passing, self._silent = {}, []
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._thread = threading.Thread(target=self._run)
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread.start()

    def silence(self):
        self._wake_writer.send(b"s")

    def close(self):
        self._wake_writer.send(b"c")
        self._thread.join()
        for sock in (*self._passing, *self._silent, self._listener):
            sock.close()
        self._wake_reader.close()
        self._wake_writer.close()

    def _run(self):
        while True:
            listening = [self._listener, self._wake_reader]
            for sock in select.select([*listening, *self._passing], [], [])[0]:
                if sock is self._listener:
                    near = sock.accept()[0]
                    far = socket.socket(socket.AF_UNIX)
                    far.connect(str(self._upstream))
                    self._passing |= {near: far, far: near}
                elif sock is not self._wake_reader:
                    self._pass_on(sock)
                elif sock.recv(1) == b"c":
                    return
                else:
                    self._silent += self._passing
                    self._passing = {}

    def _pass_on(self, sock):
        if (other := self._passing.get(sock)) is None:
            return
        with contextlib.suppress(OSError):
            if data := sock.recv(65_536):
                other.sendall(data)
                return
        for one in (sock, other):
            del self._passing[one]
            one.close()


def test_the_listener_notices_that_its_connection_leads_nowhere(
    start, redis_server, listening, eventually, tmp_path
):
    options = "concurrency=1, health_check_interval=0.5, socket_timeout=1"
    with contextlib.closing(Relay(redis_server.socket)) as relay:
        source = SINGLE.replace("concurrency=1", options)
        source += '\n@wakaq.task\ndef touch(): open("touched", "w").close()\n'
        worker = start(source, url=relay.url)
        worker.workers()
        listening(1)

        relay.silence()

        # The server counts the dead connection, too: it will not know for long.
        eventually(lambda: worker.app.touch.broadcast() == 2, within=10)
        eventually((tmp_path / "touched").exists)
        assert worker.stop() == 0
