"""Async work that a worker is assigned ahead.

A real worker process, with the test at the supervisor's end of its pipe.
"""

import json

import pytest

from wakaq.channel import Done, Recall, Recalled, Stop

APP = """
import asyncio, os
from wakaq import WakaQ

wakaq = WakaQ(queues=["high", "low"], url=os.environ["REDIS_URL"], async_concurrency=LIMIT)
client = wakaq.broker.client
events = {}

def event(name):
    return events.setdefault(name, asyncio.Event())

@wakaq.task
async def wait(name, gate="gate"):
    client.rpush("started", name)
    await event(gate).wait()
    client.rpush("done", name)

@wakaq.task
async def short():
    client.incr("ran")
    await asyncio.sleep(0.0005)

@wakaq.task
def synchronous():
    client.blpop("go")

@wakaq.after_worker_started
async def listen():
    global listening
    listening = asyncio.create_task(open_gates())

async def open_gates():
    while True:
        found = await asyncio.to_thread(client.blpop, "open", 0.2)
        if found:
            event(found[1].decode()).set()
"""


class Worker:
    """The worker, to which messages are assigned by the name of their task."""

    def __init__(self, worker):
        self._worker = worker
        self.process, self.send, self.hear = worker.process, worker.send, worker.hear
        self.leave = worker.leave

    def assign(self, name, rows, *args, is_urgent=False):
        payloads = {row: payload(name, row, *args) for row in rows}
        self._worker.assign(payloads, queue=-1 if is_urgent else 1, is_urgent=is_urgent)

    def done(self, eventually, count):
        """Wait until so many are reported as done; returns their rows by frame."""
        frames = []
        while sum(map(len, frames)) < count:
            frames.append(self.hear(eventually, Done).rows)
        return frames


@pytest.fixture
def work(start_worker):
    """`work(limit)` starts a worker whose application allows so many async tasks at once."""
    return lambda limit: Worker(start_worker(APP.replace("LIMIT", str(limit))))


def payload(name, *args):
    args = args if name == "wait" else []
    return json.dumps({"name": name, "args": args, "kwargs": {}}).encode()


def take(redis, count, key="started"):
    found = []
    for _ in range(count):
        element = redis.blpop(key, timeout=10)
        assert element, f"only {len(found)} of {count} came: {found}"
        found.append(int(element[1]))
    return found


def test_what_is_assigned_ahead_starts_in_order_as_others_end(work, redis, eventually):
    worker = work(3)
    for row in range(8):
        worker.assign("wait", [row], f"gate {row}")
    assert take(redis, 3) == [0, 1, 2]

    for ended, started in ((1, 3), (0, 4), (3, 5)):
        redis.rpush("open", f"gate {ended}")
        assert take(redis, 1) == [started]
        assert worker.done(eventually, 1) == [[ended]]
    assert redis.llen("started") == 0
    assert take(redis, 3, "done") == [1, 0, 3]


def test_a_recall_gives_back_what_waits_and_leaves_what_runs(work, redis, eventually):
    worker = work(2)
    worker.assign("wait", range(6))
    take(redis, 2)
    worker.assign("synchronous", range(10, 13))
    eventually(
        lambda: redis.info("clients")["blocked_clients"] == 2
    )  # the sync task, and the gates
    worker.send(Recall())

    assert sorted(worker.hear(eventually, Recalled).rows) == [2, 3, 4, 5, 11, 12]
    redis.rpush("open", "gate")
    redis.rpush("go", 1)
    assert sorted(row for rows in worker.done(eventually, 3) for row in rows) == [0, 1, 10]
    worker.send(Stop())
    assert worker.process.wait(5) == 0
    assert redis.llen("started") == redis.llen("go") == 0


def test_without_a_limit_nothing_waits(work, redis, eventually):
    worker = work(0)
    worker.assign("wait", range(500))
    assert take(redis, 500) == list(range(500))
    worker.send(Recall())

    assert worker.hear(eventually, Recalled).rows == []


def test_what_ends_in_one_round_of_the_loop_is_one_report(work, redis, eventually):
    worker = work(100)
    worker.assign("wait", range(200), "one gate")
    take(redis, 100)
    redis.rpush("open", "one gate")

    first, *_ = worker.done(eventually, 200)
    assert len(first) == 100


def test_a_broadcast_goes_ahead_of_what_waits(work, redis, eventually):
    worker = work(1)
    worker.assign("wait", range(3), "gate")
    assert take(redis, 1) == [0]
    worker.assign("wait", [9], "gate", is_urgent=True)
    redis.rpush("open", "gate")

    assert take(redis, 3) == [9, 1, 2]
    worker.done(eventually, 4)


def test_each_message_is_had_by_the_loop_or_by_a_recall(work, redis, eventually):
    worker = work(5)
    ran = 0
    for _ in range(30):
        worker.assign("short", range(100))
        worker.send(Recall())
        back = worker.hear(eventually, Recalled).rows
        done = [row for rows in worker.done(eventually, 100 - len(back)) for row in rows]
        ran += len(done)

        assert sorted(back + done) == list(range(100))
        assert back == sorted(back)
    assert int(redis.get("ran") or 0) == ran


def test_an_orphan_ends_what_runs_and_hands_back_what_waits(work, redis):
    worker = work(2)
    rows = range(6)
    inflight = {row + 1: payload("wait", row, "gate") for row in rows}
    redis.hset("wakaq:inflight:low:me", mapping=inflight)
    worker.assign("wait", rows, "gate")
    take(redis, 2)
    worker.leave()
    back = [json.loads(redis.blpop("wakaq:low", timeout=10)[1])["args"][0] for _ in range(4)]
    redis.rpush("open", "gate")

    assert worker.process.wait(10) == 0
    assert back == [2, 3, 4, 5]
    assert take(redis, 2, "done") == [0, 1]
    assert redis.llen("started") == redis.llen("wakaq:low") == 0
    assert redis.keys("wakaq:inflight:*") == []
    assert redis.hget("wakaq:stats:low", "done") == b"2"
