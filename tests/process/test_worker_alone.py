"""A worker by itself: how it starts, and what it does when its supervisor has died."""

import contextlib
import json
import os
import signal
import time

import psutil
import pytest

from wakaq.channel import Adopted, Done, Failed, Outcome, Ping, Recall, Recalled
from wakaq.progress import ASSIGNED
from wakaq.store.dead_letter import DeadLetter
from wakaq.worker.main import BOOT_FAILED

APP = """
import asyncio, os, time
from contextvars import ContextVar
from wakaq import WakaQ

wakaq = WakaQ(queues=["high", "low"], url=os.environ["REDIS_URL"])
client = wakaq.broker.client
seen = ContextVar("seen", default="nothing")

@wakaq.task
def hold(name, seconds=60):
    client.rpush("started", name)
    client.blpop(f"release {name}", seconds)

@wakaq.task
async def ahold(name):
    client.rpush("started", name)
    while not os.path.exists(name):
        await asyncio.sleep(0.01)

@wakaq.task(hard_timeout=0.5)
def hard():
    client.rpush("started", "hard")
    time.sleep(60)

@wakaq.task(soft_timeout=0.5)
def soft():
    client.rpush("started", "soft")
    time.sleep(60)

@wakaq.task
def look(name):
    client.rpush("seen", seen.get())
    seen.set(name)
"""
INFLIGHT = "wakaq:inflight:low:me"


def payload(name, *args):
    return json.dumps({"name": name, "args": args, "kwargs": {}}).encode()


def pop(redis, key, within=10):
    element = redis.blpop(key, timeout=within)
    assert element, f"nothing came in {key}"
    return element[1].decode()


@pytest.fixture
def worker(start_worker):
    return start_worker(APP)


@pytest.fixture
def give(redis):
    """`give(worker, payloads)` assigns payloads by row, as a supervisor that has claimed them."""

    def assign(worker, payloads, client=redis):
        numbers = {row + 1: one for row, one in payloads.items()}
        client.hset(INFLIGHT, mapping=numbers)
        worker.assign(payloads)

    return assign


def registered(redis):
    return {field.decode() for field in redis.hkeys("wakaq:registry:turns")}


def assert_nothing_left(redis):
    assert redis.keys("wakaq:inflight:*") == redis.keys("wakaq:registry:*") == []


# -- its life under a supervisor -------------------------------------------------------------------


def test_a_task_does_not_see_what_another_left_in_its_context(worker, redis, eventually):
    worker.assign({0: payload("look", "a"), 1: payload("look", "b")})

    assert pop(redis, "seen") == pop(redis, "seen") == "nothing"
    worker.hear(eventually, Done)


def test_a_signal_for_stacks_does_not_kill_a_worker_that_is_starting(start_worker, redis):
    hook = """
@wakaq.after_worker_started
def wait():
    import signal
    client.set("pid", os.getpid())
    os.kill(os.getpid(), signal.SIGUSR1)
"""
    worker = start_worker(APP + hook)

    assert int(redis.get("pid")) == worker.pid


def test_a_worker_that_cannot_start_says_why(start_worker):
    hook = """
@wakaq.after_worker_started
def fail():
    raise ValueError("no such thing")
"""
    worker = start_worker(APP + hook, expects=Failed)

    assert worker.first == Failed("ValueError: no such thing")
    assert worker.process.wait(5) == BOOT_FAILED


def test_a_ping_is_answered_while_a_task_runs(worker, give, redis, eventually):
    give(worker, {0: payload("hold", "a")})
    pop(redis, "started")
    before = worker.progress.pong_at
    worker.send(Ping())

    eventually(lambda: worker.progress.pong_at > before)


def test_what_was_not_begun_is_given_back(worker, give, redis, eventually):
    give(worker, {row: payload("hold", f"{row}") for row in range(3)})
    pop(redis, "started")
    worker.send(Recall())

    assert worker.hear(eventually, Recalled).rows == [1, 2]


def test_an_async_task_that_cancels_all_has_those_begun_that_had_not(
    start_worker, redis, tmp_path, eventually
):
    task = """
@wakaq.task
async def cancel():
    for one in asyncio.all_tasks() - {asyncio.current_task()}:
        one.cancel()
"""
    worker = start_worker(APP + task)
    (tmp_path / "a").touch()
    worker.progress.states[0] = worker.progress.states[1] = ASSIGNED
    worker.assign({0: payload("cancel"), 1: payload("ahold", str(tmp_path / "a"))})

    rows = set()
    while rows != {0, 1}:
        rows |= set(worker.hear(eventually, Done).rows)
    assert redis.llen("started") == 1


def test_an_async_task_whose_outcome_cannot_be_decided_is_a_dead_letter(start_worker, eventually):
    task = """
from wakaq.worker import async_runner

def fail(*_):
    raise ArithmeticError("a bug")

async_runner.failed = fail

@wakaq.task
async def bad():
    raise ValueError("first")
"""
    worker = start_worker(APP + task)
    worker.assign({0: payload("bad")})
    outcome = worker.hear(eventually, Outcome)

    letter = DeadLetter.decode(outcome.payload)
    assert (outcome.row, letter.payload) == (0, payload("bad"))
    assert "ArithmeticError: a bug" in letter.traceback


# -- without one -----------------------------------------------------------------------------------


def test_without_anything_to_run_it_ends_at_once(worker, redis):
    worker.leave()

    assert worker.process.wait(2) == 0
    assert redis.keys("wakaq:*") == []


def test_what_runs_is_acked_and_what_waits_is_handed_back_in_order(
    worker, give, redis, tmp_path, eventually
):
    sync, waiting = [payload("hold", "a")], [payload("hold", "b"), payload("hold", "c")]
    rows = [*sync, payload("ahold", "d"), *waiting]
    give(worker, dict(enumerate(rows)))
    assert {pop(redis, "started"), pop(redis, "started")} == {"a", "d"}
    worker.leave()
    eventually(lambda: redis.lrange("wakaq:low", 0, -1) == waiting)
    (orphan,) = registered(redis)
    assert orphan != "me"
    assert sorted(redis.hvals(f"wakaq:inflight:low:{orphan}")) == sorted(rows[:2])
    redis.rpush("release a", 1)
    (tmp_path / "d").touch()

    assert worker.process.wait(5) == 0
    assert redis.hget("wakaq:stats:low", "done") == b"2"
    assert redis.lrange("wakaq:low", 0, -1) == waiting
    assert_nothing_left(redis)


def test_it_makes_a_turn_a_second_and_keeps_its_entry(worker, give, redis, eventually):
    give(worker, {0: payload("hold", "a")})
    pop(redis, "started")
    worker.leave()
    (orphan,) = eventually(lambda: registered(redis) or False)

    def turn():
        return int(redis.hget("wakaq:registry:turns", orphan).split()[0])

    first = turn()
    eventually(lambda: turn() >= first + 3, within=4.5)
    entry = json.loads(redis.hget("wakaq:registry:workers", orphan))
    assert entry["pid"] == worker.pid
    assert entry["beat"] >= first
    redis.rpush("release a", 1)
    assert worker.process.wait(5) == 0
    assert_nothing_left(redis)


def test_a_broadcast_that_runs_ends_without_redis_knowing(worker, redis):
    worker.assign({0: payload("hold", "a")}, queue=-1, is_urgent=True)
    pop(redis, "started")
    worker.leave()
    redis.rpush("release a", 1)

    assert worker.process.wait(5) == 0
    assert redis.keys("wakaq:*") == []


def test_what_others_have_rescued_is_run_to_its_end_and_not_settled(worker, give, redis):
    give(worker, {0: payload("hold", "a")})
    pop(redis, "started")
    redis.delete(INFLIGHT)
    worker.leave()
    redis.rpush("release a", 1)

    assert worker.process.wait(5) == 0
    assert redis.hget("wakaq:stats:low", "done") is None
    assert_nothing_left(redis)


def test_another_call_under_its_number_is_put_back(worker, give, redis):
    give(worker, {0: payload("hold", "a")})
    pop(redis, "started")
    redis.hset(INFLIGHT, 1, b"another")
    worker.leave()
    redis.rpush("release a", 1)

    assert worker.process.wait(5) == 0
    assert redis.lrange("wakaq:low", 0, -1) == [b"another"]
    assert_nothing_left(redis)


def test_it_knows_what_is_in_flight_under_another_id(worker, give, redis):
    give(worker, {0: payload("hold", "a"), 1: payload("hold", "b"), 2: payload("hold", "c")})
    pop(redis, "started")
    redis.delete(INFLIGHT)
    redis.hset(f"{INFLIGHT} again", mapping={7: payload("hold", "a"), 9: payload("hold", "c")})
    worker.send(Adopted("me again", [0, 1, 2], [7, 0, 9]))
    worker.leave()
    assert redis.blmove("wakaq:low", "moved", 10) == payload("hold", "c")
    redis.rpush("release a", 1)

    assert worker.process.wait(5) == 0
    assert redis.hget("wakaq:stats:low", "done") == b"1"
    assert redis.llen("wakaq:low") == 0
    assert_nothing_left(redis)


def test_an_evicted_one_goes_on_under_another_id(worker, give, redis, eventually):
    give(worker, {0: payload("hold", "a")})
    pop(redis, "started")
    worker.leave()
    (first,) = eventually(lambda: registered(redis) or False)
    eventually(lambda: redis.hexists("wakaq:registry:workers", first))
    redis.hdel("wakaq:registry:turns", first)
    eventually(lambda: registered(redis) - {first})
    redis.rpush("release a", 1)

    assert worker.process.wait(5) == 0
    assert redis.hget("wakaq:stats:low", "done") == b"1"
    assert_nothing_left(redis)


def test_a_hard_timeout_leaves_a_dead_letter_with_the_stacks(worker, give, redis):
    give(worker, {0: payload("hard"), 1: payload("ahold", "b")})
    assert {pop(redis, "started"), pop(redis, "started")} == {"hard", "b"}
    worker.leave()

    assert worker.process.wait(5) == -signal.SIGKILL
    letter = DeadLetter.decode(redis.lindex("wakaq:dead:low", 0))
    assert (letter.reason, letter.payload) == ("hard timeout", payload("hard"))
    assert "in hard" in letter.traceback
    # What shared its worker with it runs again, and nothing is counted against it.
    assert redis.lrange("wakaq:low", 0, -1) == [payload("ahold", "b")]
    assert_nothing_left(redis)


@pytest.fixture
def away(make_server, start_worker):
    """A worker and the server that it uses, which can be taken away."""
    server = make_server("--appendonly", "yes", "--appendfsync", "always")
    return start_worker(APP, url=server.url), server


def test_a_hard_timeout_is_kept_while_redis_is_away(away, give):
    worker, server = away
    with server.client() as client:
        give(worker, {0: payload("hard")}, client)
        pop(client, "started")
    server.stop()
    began = time.monotonic()
    worker.leave()

    assert worker.process.wait(5) == -signal.SIGKILL
    assert time.monotonic() - began < 2


def test_a_soft_timeout_is_kept_while_redis_is_frozen(away, give, eventually):
    worker, server = away
    with server.client() as client:
        give(worker, {0: payload("soft")}, client)
        pop(client, "started")
    os.kill(server.process.pid, signal.SIGSTOP)
    worker.leave()
    eventually(lambda: "SoftTimeout" in worker.log.read_text(), within=2)
    os.kill(server.process.pid, signal.SIGCONT)

    assert worker.process.wait(10) == 0
    with server.client() as client:
        assert DeadLetter.decode(client.lindex("wakaq:dead:low", 0)).reason == "soft timeout"
        assert_nothing_left(client)


def test_what_redis_refuses_to_settle_does_not_keep_it(worker, give, redis):
    give(worker, {0: payload("soft")})
    pop(redis, "started")
    redis.set("wakaq:dead:low", "no list")
    worker.leave()

    assert worker.process.wait(10) == 0
    assert len(redis.keys("wakaq:inflight:*")) == 1
    assert "WRONGTYPE" in worker.log.read_text()


def test_a_fork_of_a_worker_ends_when_the_pipe_has_ended(start_worker, redis, eventually):
    fork = """
@wakaq.task
def fork():
    if os.fork() == 0:
        client.rpush("forked", os.getpid())
"""
    worker = start_worker(APP + fork)
    worker.assign({0: payload("fork")})
    pid = int(pop(redis, "forked"))
    worker.leave()
    worker.process.wait(5)

    def has_ended():
        with contextlib.suppress(psutil.NoSuchProcess):
            assert psutil.Process(pid).status() == psutil.STATUS_ZOMBIE

    eventually(has_ended)
