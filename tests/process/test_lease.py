"""Who is declared dead and who is not, and what becomes of what the dead had claimed.

Leases here are short.
"""

import json
import os
import signal

import pytest

APP = """
import functools, os, sys, time
from pathlib import Path
import redis
from wakaq import WakaQ
import wakaq.store.registry, wakaq.supervisor.lease, wakaq.supervisor.supervisor

if "pytest" not in sys.modules:  # this is a command of the test
    term = float(os.environ.get("LEASE", "0.5"))
    wakaq.supervisor.supervisor.Lease = functools.partial(wakaq.supervisor.lease.Lease, term=term)
    wakaq.supervisor.dispatcher.BEAT = min(1.0, term / 5)
    wakaq.store.registry.host_identity = lambda: os.environ["HOST_NAME"]

client = redis.Redis.from_url(os.environ["REDIS_URL"])
wakaq = WakaQ(
    queues=["default", "other"], concurrency=int(os.environ.get("WORKERS", "1")),
    url=os.environ["REDIS_URL"],
    wait_timeout=0.2,
)

@wakaq.task(queue="default")
def hold(name):
    client.rpush("started", f"{os.getpid()} {name}")
    while not Path(f"release-{name}").exists():
        time.sleep(0.01)
    client.rpush("done", name)

@wakaq.task(queue="default")
def note(name):
    client.rpush("done", name)
"""


@pytest.fixture
def start_at(start, monkeypatch):
    """`start_at(host, app, **environment)` starts a worker on a machine of that name."""

    def run(host, app=APP, url=None, **environment):
        for name, value in ({"HOST_NAME": host} | environment).items():
            monkeypatch.setenv(name, value)
        return start(app, **({"url": url} if url else {}))

    return run


def pop(redis, key, within=10):
    element = redis.blpop(key, timeout=within)
    assert element, f"nothing came in {key}"
    return element[1].decode()


def started(redis):
    return int(pop(redis, "started").split()[0])


def release(tmp_path, name):
    (tmp_path / f"release-{name}").touch()


def inflight(redis):
    return {key.decode(): redis.lrange(key, 0, -1) for key in redis.keys("wakaq:inflight:*")}


def kill_machine(command):
    command.process.kill()
    command.destroy()


def payload(name, **more):
    return json.dumps({"name": "note", "args": [name], "kwargs": {}} | more)


def register(redis, worker_id="dead-1", **fields):
    entry = {"beat": 7, "concurrency": 2, "queues": ["default", "other"]} | fields
    redis.hset("wakaq:registry:workers", worker_id, json.dumps(entry))
    redis.hset("wakaq:registry:turns", worker_id, 3)


def test_what_a_lost_machine_was_running_runs_on_another(start_at, redis, tmp_path):
    lost = start_at("here")
    lost.app.hold.delay("a")
    pid = started(redis)
    other = start_at("there", lost.app)
    other.workers()
    kill_machine(lost)
    release(tmp_path, "a")

    assert started(redis) != pid
    assert pop(redis, "done") == "a"
    assert redis.hget("wakaq:stats:default", "redelivered") == b"1"
    assert other.stop() == 0
    assert inflight(redis) == {}
    assert redis.hkeys("wakaq:registry:turns") == []


def test_a_supervisor_rescues_at_once_where_the_process_of_a_dead_one_is_gone(
    start_at, redis, tmp_path
):
    lost = start_at("here", LEASE="15")
    lost.app.hold.delay("a")
    started(redis)
    kill_machine(lost)
    release(tmp_path, "a")
    again = start_at("here", lost.app, LEASE="15")

    assert pop(redis, "done", within=4) == "a"
    assert again.stop() == 0
    assert inflight(redis) == {}


def test_a_task_of_twenty_leases_runs_once_while_its_supervisor_lives(
    start_at, redis, tmp_path, eventually
):
    worker = start_at("here", LEASE="0.2")
    worker.app.hold.delay("a")
    started(redis)
    observers = [start_at(f"there {number}", worker.app) for number in range(2)]
    for observer in observers:
        observer.workers()
    registry = "wakaq:registry:workers"
    (owner,) = [
        k for k, v in redis.hgetall(registry).items() if json.loads(v)["same_host"] == "here"
    ]
    first = json.loads(redis.hget(registry, owner))["beat"]
    # A lease is five heartbeats.
    eventually(lambda: json.loads(redis.hget(registry, owner))["beat"] >= first + 100, within=15)
    release(tmp_path, "a")

    assert pop(redis, "done") == "a"
    assert redis.llen("started") == 0
    for command in (worker, *observers):
        assert command.stop() == 0
        assert "dead" not in command.log


def test_a_supervisor_that_was_stopped_finds_out_that_it_was_declared_dead_and_goes_on(
    start_at, redis, tmp_path, eventually
):
    stopped = start_at("here")
    stopped.app.hold.delay("a")
    first = started(redis)
    observer = start_at("there", stopped.app)
    observer.workers()
    (before,) = [
        key for key in redis.hkeys("wakaq:registry:workers") if str(stopped.pid) in key.decode()
    ]
    os.kill(stopped.pid, signal.SIGSTOP)
    eventually(lambda: "it is dead" in observer.log)
    second = started(redis)
    assert observer.stop(signal.SIGQUIT) == 0
    os.kill(stopped.pid, signal.SIGCONT)
    eventually(lambda: "going on under a new id" in stopped.log)
    release(tmp_path, "a")

    assert first != second
    assert pop(redis, "done") == "a"  # its own run, which nobody interrupted
    stopped.app.note.delay("next")
    assert {pop(redis, "done"), pop(redis, "done")} == {"a", "next"}
    names = [key for key in redis.hkeys("wakaq:registry:workers") if not key.startswith(b"dead:")]
    assert len(names) == 1
    assert names != [before]
    assert stopped.stop() == 0
    assert inflight(redis) == {}


def test_an_idle_supervisor_that_was_stopped_serves_at_once_when_it_goes_on(
    start_at, redis, eventually
):
    worker = start_at("here", LEASE="0.3")
    worker.workers()
    worker.app.note.delay("a")
    assert pop(redis, "done") == "a"
    eventually(lambda: redis.hget("wakaq:stats:default", "done") == b"1")
    registry = "wakaq:registry:workers"
    os.kill(worker.pid, signal.SIGSTOP)
    observer = start_at("there", worker.app)
    eventually(lambda: "it is dead" in observer.log)
    assert observer.stop() == 0
    os.kill(worker.pid, signal.SIGCONT)
    worker.app.note.delay("b")

    assert pop(redis, "done", within=3) == "b"
    eventually(lambda: any(str(worker.pid) in key.decode() for key in redis.hkeys(registry)))
    assert worker.stop() == 0
    assert inflight(redis) == {}


def test_a_supervisor_whose_registry_is_emptied_registers_anew(start_at, redis, eventually):
    worker = start_at("here")
    worker.workers()
    eventually(lambda: redis.hlen("wakaq:registry:turns") == 1)
    redis.flushall()
    eventually(lambda: redis.hlen("wakaq:registry:turns") == 1)
    worker.app.note.delay("a")

    assert pop(redis, "done") == "a"
    assert worker.stop() == 0


def test_several_rescuers_move_each_payload_once_and_in_order(
    start_at, redis, tmp_path, eventually
):
    commands = [start_at("there 0")]
    app = commands[0].app
    commands += [start_at(f"there {number}", app) for number in (1, 2)]
    for number, command in enumerate(commands):
        command.workers()
        app.hold.delay(str(number))
    for _ in commands:
        started(redis)
    # All workers are busy, so that what is rescued stays where it was put.
    names = [f"{number:03}" for number in range(250)]
    redis.rpush("wakaq:default", payload("waiting"))
    redis.rpush("wakaq:inflight:default:dead-1:1", *(payload(name) for name in names))
    register(redis)
    eventually(lambda: redis.llen("wakaq:default") == 251)
    waiting = [json.loads(found) for found in redis.lrange("wakaq:default", 0, -1)]
    for number in range(3):
        release(tmp_path, str(number))
    ran = sorted(pop(redis, "done") for _ in range(254))

    assert [message["args"][0] for message in waiting] == [*names, "waiting"]
    # Of sync tasks only the first of a lane can have been running.
    assert [message.get("redelivered", 0) for message in waiting] == [1] + [0] * 250
    assert ran == sorted([*names, "waiting", "0", "1", "2"])
    assert redis.llen("done") == 0
    for command in commands:
        assert command.stop() == 0


def test_what_is_claimed_for_a_dead_supervisor_after_its_rescue_is_found(
    start_at, redis, eventually
):
    worker = start_at("here")
    worker.workers()
    register(redis)
    eventually(lambda: redis.hexists("wakaq:registry:workers", "dead:dead-1"))
    redis.rpush("wakaq:inflight:other:dead-1:0", payload("late"))

    assert pop(redis, "done") == "late"
    assert worker.stop() == 0
    assert inflight(redis) == {}


def test_entries_that_are_garbage_are_buried_and_the_rest_goes_on(start_at, redis, eventually):
    registry = "wakaq:registry:workers"
    redis.hset(registry, "garbage", b"\xff no json")
    redis.hset(registry, "nested", "[" * 100_000)
    redis.hset(registry, "list", "[1]")
    register(redis, "huge", concurrency=10**12, queues=["default"])
    register(redis, "odd", concurrency="many", queues=[None, ["x"], "no name!", {}, "other"])
    for name in ("garbage", "list", "odd"):
        redis.rpush(f"wakaq:inflight:other:{name}:1", payload(name), b"\xff garbage")
    worker = start_at("here")

    assert sorted(pop(redis, "done") for _ in range(3)) == ["garbage", "list", "odd"]
    eventually(lambda: redis.llen("wakaq:dead:other") == 3)
    eventually(lambda: sum(not key.startswith(b"dead:") for key in redis.hkeys(registry)) == 1)
    assert worker.log.count("entry garbage is no JSON") <= 2
    assert worker.stop() == 0
    assert inflight(redis) == {}


def test_a_queue_of_a_wrong_type_is_named_in_the_log_once_and_others_go_on(
    start_at, redis, eventually
):
    redis.set("wakaq:other", "no list")
    redis.rpush("wakaq:inflight:other:dead-1:1", payload("kept"))
    redis.rpush("wakaq:inflight:default:dead-1:1", payload("rescued"))
    redis.set("wakaq:inflight:default:dead-1:2", "no list")
    register(redis)
    worker = start_at("here")

    assert pop(redis, "done") == "rescued"
    for number in range(100):
        worker.app.note.delay(f"{number:02}")
    assert [pop(redis, "done") for _ in range(100)] == [f"{number:02}" for number in range(100)]
    for key in ("wakaq:other: WRONGTYPE", "wakaq:inflight:default:dead-1:2: WRONGTYPE"):
        eventually(lambda key=key: key in worker.log)
        assert worker.log.count(key) == 1
    assert redis.lrange("wakaq:inflight:other:dead-1:1", 0, -1) == [payload("kept").encode()]
    redis.delete("wakaq:other", "wakaq:inflight:default:dead-1:2")
    assert pop(redis, "done", within=8) == "kept"
    assert worker.stop() == 0
