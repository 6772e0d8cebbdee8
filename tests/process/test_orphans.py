"""What becomes of workers whose supervisor is gone.

They end what they run, ack it themselves, and exit.
"""

import os
import signal
from pathlib import Path

import pytest

APP = """
import asyncio, functools, os, sys, time
from pathlib import Path
import redis
from wakaq import SoftTimeout, WakaQ
import wakaq.store.registry, wakaq.supervisor.lease, wakaq.supervisor.supervisor
import wakaq.worker.orphan

if "pytest" not in sys.modules:  # this is a command of the test, whose leases are to be short
    term = float(os.environ.get("LEASE", "15"))
    wakaq.supervisor.supervisor.Lease = functools.partial(wakaq.supervisor.lease.Lease, term=term)
    wakaq.supervisor.dispatcher.BEAT = min(1.0, term / 5)
    wakaq.worker.orphan.BEAT = term / 5
    if host := os.environ.get("HOST_NAME"):
        wakaq.store.registry.host_identity = lambda: host

client = redis.Redis.from_url(os.environ["REDIS_URL"])
wakaq = WakaQ(queues=["default"], concurrency=1, url=os.environ["REDIS_URL"], wait_timeout=0.2,
    max_redeliveries=99)

def wait_until(name):
    while not Path(name).exists():
        time.sleep(0.01)

@wakaq.task
def hold(name):
    client.rpush("started", f"{os.getpid()} {name}")
    wait_until(f"release-{name}")
    client.rpush("done", name)

@wakaq.task
async def ahold(name):
    client.rpush("started", f"{os.getpid()} {name}")
    while not Path(f"release-{name}").exists():
        await asyncio.sleep(0.01)
    client.rpush("done", name)

@wakaq.task(soft_timeout=1)
def soft():
    client.rpush("started", f"{os.getpid()} soft")
    time.sleep(60)

@wakaq.task(hard_timeout=1)
def hard():
    client.rpush("started", f"{os.getpid()} hard")
    time.sleep(60)

@wakaq.task
def tick():
    with open("ticks", "ab", buffering=0) as file:
        file.write(b".")
    time.sleep(0.0005)
"""


def pop(redis, key, within=10):
    element = redis.blpop(key, timeout=within)
    assert element, f"nothing came in {key}"
    return element[1].decode()


def started(redis):
    """Return the pid of the worker of the next task that starts."""
    return int(pop(redis, "started").split()[0])


def release(tmp_path, name):
    (tmp_path / f"release-{name}").touch()


def kill_supervisor(command):
    command.process.kill()
    command.wait()


def inflight(redis):
    return {key.decode(): redis.hvals(key) for key in redis.keys("wakaq:inflight:*")}


@pytest.fixture
def is_over(eventually):
    """`is_over(command)` waits until no process of the command is left."""

    def wait(command, within=3):
        def nobody():
            assert not command.titles()

        eventually(nobody, within=within)

    return wait


def test_a_worker_without_supervisor_ends_its_task_acks_it_and_exits(
    start, redis, tmp_path, eventually, is_over
):
    worker = start(APP)
    worker.app.hold.delay("a")
    pid = started(redis)
    kill_supervisor(worker)
    (lane,) = eventually(
        lambda: [key for key in inflight(redis) if f"orphan-{pid}" in key] or False
    )
    again = start(worker.app)
    again.workers()
    release(tmp_path, "a")
    is_over(worker)

    assert lane not in inflight(redis)
    assert pop(redis, "done") == "a"
    assert again.stop() == 0
    assert redis.llen("done") == redis.llen("started") == redis.llen("wakaq:default") == 0
    assert inflight(redis) == {}


def test_async_tasks_of_an_orphan_end_as_well(start, redis, tmp_path, is_over):
    worker = start(APP)
    for name in "abc":
        worker.app.ahold.delay(name)
    for _ in "abc":
        started(redis)
    kill_supervisor(worker)
    for name in "abc":
        release(tmp_path, name)
    is_over(worker)

    assert sorted(pop(redis, "done") for _ in "abc") == ["a", "b", "c"]
    assert inflight(redis) == {}
    assert redis.llen("wakaq:default") == 0


def test_an_idle_orphan_exits_at_once_also_after_many_tasks(start, redis, eventually, is_over):
    worker = start(APP)
    for _ in range(50):
        worker.app.tick.delay()
    eventually(lambda: redis.hget("wakaq:stats:default", "done") == b"50")
    kill_supervisor(worker)

    is_over(worker, within=2)


def test_equal_tasks_that_the_dead_supervisor_had_just_claimed_are_not_acked_in_place_of_others(
    start, redis, tmp_path, eventually
):
    count = 3_000
    worker = start(APP)
    with worker.app.wakaq.batch():
        for _ in range(count):
            worker.app.tick.delay()
    ticks = tmp_path / "ticks"
    for part in (0.2, 0.5):
        eventually(lambda least=part * count: ticks.exists() and ticks.stat().st_size >= least)
        kill_supervisor(worker)
        worker = start(worker.app)

    def all_ran():
        assert redis.llen("wakaq:default") == 0
        assert inflight(redis) == {}

    eventually(all_ran, within=15)
    assert ticks.stat().st_size >= count


def test_an_orphan_keeps_the_soft_timeout(start, redis, is_over):
    worker = start(APP)
    worker.app.soft.delay()
    started(redis)
    kill_supervisor(worker)
    is_over(worker, within=4)

    assert b"soft timeout" in redis.lindex("wakaq:dead:default", 0)
    assert inflight(redis) == {}


def test_an_orphan_keeps_the_hard_timeout(start, redis, is_over):
    worker = start(APP)
    worker.app.hard.delay()
    started(redis)
    kill_supervisor(worker)
    is_over(worker, within=4)

    assert b"hard timeout" in redis.lindex("wakaq:dead:default", 0)
    assert inflight(redis) == {}


def test_an_orphan_that_lives_is_not_robbed(start, redis, tmp_path, monkeypatch, eventually):
    monkeypatch.setenv("LEASE", "0.3")
    worker = start(APP)
    worker.app.hold.delay("a")
    started(redis)
    monkeypatch.setenv("HOST_NAME", "another")
    other = start(worker.app)
    other.workers()
    kill_supervisor(worker)
    eventually(lambda: "it is dead" in other.log)
    entry = eventually(
        lambda: [f for f in redis.hkeys("wakaq:registry:workers") if b"-orphan-" in f] or False
    )[0]
    for _ in range(12):  # heartbeats, of which five make a lease
        before = redis.hget("wakaq:registry:workers", entry)
        eventually(lambda seen=before: redis.hget("wakaq:registry:workers", entry) != seen)
    release(tmp_path, "a")

    assert pop(redis, "done") == "a"
    assert other.stop() == 0
    assert redis.llen("started") == 0


def test_the_task_of_an_orphan_that_dies_is_run_by_others(
    start, redis, tmp_path, monkeypatch, eventually
):
    monkeypatch.setenv("LEASE", "0.3")
    worker = start(APP)
    worker.app.hold.delay("a")
    pid = started(redis)
    kill_supervisor(worker)
    eventually(lambda: any("-orphan-" in key for key in inflight(redis)))
    os.kill(pid, signal.SIGKILL)
    monkeypatch.setenv("HOST_NAME", "another")
    release(tmp_path, "a")
    other = start(worker.app)

    assert started(redis) != pid
    assert pop(redis, "done") == "a"
    assert other.stop() == 0
    assert inflight(redis) == {}


def test_a_fork_server_that_dies_is_reaped_and_replaced(start, redis, tmp_path, eventually):
    worker = start(APP)
    pids = worker.workers()

    def forkservers():
        return [pid for pid, title in worker.titles().items() if "fork server" in title]

    (before,) = eventually(forkservers)
    os.kill(before, signal.SIGKILL)
    eventually(lambda: not Path(f"/proc/{before}").exists() and forkservers(), within=3)
    worker.app.hold.delay("a")
    assert started(redis) in pids  # its workers live on
    release(tmp_path, "a")

    assert pop(redis, "done") == "a"
    assert worker.stop() == 0


def test_an_orphan_acks_when_redis_is_back(start, make_server, tmp_path, is_over):
    server = make_server("--appendonly", "yes", "--appendfsync", "always")
    worker = start(APP.replace('client.rpush("done", name)', "pass"), url=server.url)
    worker.app.hold.delay("a")
    with server.client() as client:
        started(client)
    server.stop()
    kill_supervisor(worker)
    release(tmp_path, "a")
    server.start()
    is_over(worker, within=8)

    with server.client() as client:
        assert inflight(client) == {}
        assert client.hget("wakaq:stats:default", "done") == b"1"
