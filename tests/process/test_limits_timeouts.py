"""Soft and hard timeouts.

What they interrupt, what they leave alone, and what they leave behind.
"""

import json
import re

import psutil
import pytest

APP = """
import os, re, socket, subprocess, time
import redis
from wakaq import Queue, SoftTimeout, WakaQ
client = redis.Redis.from_url(os.environ["REDIS_URL"])
wakaq = WakaQ(queues=["default"], concurrency=1, url=os.environ["REDIS_URL"], wait_timeout=0.2)

def compute():
    number = 0
    while True:
        number += 1

def sleep():
    time.sleep(3600)

def read():
    ours, theirs = socket.socketpair()
    ours.recv(1)

def match():  # holds the GIL for years, but looks for signals
    re.match(r"(a+)+$", "a" * 64 + "b")

def add():  # holds the GIL for years, in C code that looks at nothing
    sum(range(10**18))

BODIES = {"compute": compute, "sleep": sleep, "read": read, "match": match, "add": add}

@wakaq.task(soft_timeout=0.3, hard_timeout=0.8)
def stuck(how, ignores=False):
    began = time.monotonic()
    try:
        BODIES[how]()
    except Exception:
        client.rpush("soft", "never: SoftTimeout is no Exception")
    except SoftTimeout:
        client.rpush("soft", time.monotonic() - began)
        if not ignores:
            raise
        BODIES[how]()

@wakaq.task
def note(name):
    client.rpush("done", name)

@wakaq.task(soft_timeout=0.2)
def cleans_up(name):
    try:
        time.sleep(60)
    except SoftTimeout:
        client.rpush("done", name)
"""


def popped(redis, count, key="done", within=10):
    found = []
    for _ in range(count):
        element = redis.blpop(key, timeout=within)
        assert element, f"only {len(found)} of {count} came: {found}"
        found.append(element[1].decode())
    return found


def letter_of(redis, eventually, queue="default"):
    """Return the only dead letter, once it is there."""
    eventually(lambda: redis.llen(f"wakaq:dead:{queue}") == 1)
    return json.loads(redis.lindex(f"wakaq:dead:{queue}", 0))


@pytest.mark.parametrize("how", ["compute", "sleep", "read", "match"])
def test_a_soft_timeout_interrupts_python_code_within_a_tenth_of_a_second(
    start, redis, eventually, how
):
    worker = start(APP)
    worker.app.stuck.delay(how)

    assert 0.3 <= float(popped(redis, 1, "soft")[0]) < 0.4
    letter = letter_of(redis, eventually)
    assert letter["reason"] == "soft timeout"
    assert f"in {how}" in letter["traceback"]
    assert "Task stuck failed (soft timeout), and becomes a dead letter" in worker.log
    assert f"in stuck args=['{how}'] kwargs={{}} retry=0" in worker.log


@pytest.mark.parametrize("how", ["compute", "sleep", "read", "match", "add"])
def test_a_hard_timeout_ends_whatever_the_task_does(start, redis, eventually, how):
    worker = start(APP)
    worker.app.stuck.delay(how, ignores=True)
    worker.app.note.delay("next")

    assert popped(redis, 1) == ["next"]
    letter = letter_of(redis, eventually)
    assert letter["reason"] == "hard timeout"
    payload = json.loads(letter["payload"])
    assert payload == {"name": "stuck", "args": [how], "kwargs": {"ignores": True}}
    assert f"in {how}" in letter["traceback"]
    assert redis.llen("soft") == (0 if how == "add" else 1)
    eventually(lambda: "by us, because of: hard timeout" in worker.log)
    log = worker.log
    ran = re.search(
        rf"stuck\('{how}', ignores=True\) ran into its hard timeout after ([\d.]+) s", log
    )
    assert 0.8 <= float(ran[1]) < 1.5
    assert "was killed by SIGKILL after" in log
    assert f"in {how}" in log
    assert worker.stop() == 0
    assert redis.keys("wakaq:inflight:*") == []


def test_a_soft_timeout_that_the_task_catches_lets_it_go_on(start, redis, eventually):
    worker = start(APP)
    worker.app.cleans_up.delay("clean")

    assert popped(redis, 1) == ["clean"]
    eventually(lambda: redis.hgetall("wakaq:stats:default") == {b"done": b"1"})
    assert redis.llen("wakaq:dead:default") == 0


def test_an_error_caused_by_a_soft_timeout_counts_as_one(start, redis, eventually):
    worker = start(
        APP
        + """
@wakaq.task(soft_timeout=0.1, max_retries=1)
def disguised():
    client.rpush("started", "")
    try:
        time.sleep(60)
    except SoftTimeout as error:
        raise RuntimeError("connection lost") from error
"""
    )
    worker.app.disguised.delay()

    letter = letter_of(redis, eventually)
    assert letter["reason"] == "soft timeout"
    assert json.loads(letter["payload"])["retry"] == 1
    assert redis.llen("started") == 2


def test_no_process_of_the_task_is_left_after_a_hard_timeout(start, redis, eventually):
    worker = start(
        APP
        + """
@wakaq.task(hard_timeout=0.5)
def spawns():
    shell = subprocess.Popen(["sh", "-c", "sleep 3600 & echo $!; wait"], stdout=subprocess.PIPE)
    client.rpush("pids", shell.pid, int(shell.stdout.readline()))
    subprocess.run(["sleep", "3600"])
"""
    )
    worker.app.spawns.delay()
    pids = [int(pid) for pid in popped(redis, 2, "pids")]
    assert letter_of(redis, eventually)["reason"] == "hard timeout"

    def has_no_such_process():
        assert not any(psutil.pid_exists(pid) for pid in pids)
        assert "sleep" not in [process.name() for process in worker.processes()]

    eventually(has_no_such_process)
    assert worker.stop() == 0


def test_what_waited_behind_a_killed_task_runs_in_its_order(start, redis, eventually):
    worker = start(APP)
    with worker.app.wakaq.batch():
        for number in range(200):
            worker.app.note.delay(number)
        worker.app.stuck.delay("add")
        for number in range(200, 400):
            worker.app.note.delay(number)

    assert popped(redis, 400) == [str(number) for number in range(400)]
    assert letter_of(redis, eventually)["reason"] == "hard timeout"
    assert redis.hget("wakaq:stats:default", "redelivered") is None


@pytest.mark.parametrize("level", ["task", "queue", "app"])
def test_timeouts_hold_by_task_then_queue_then_app(start, redis, eventually, level):
    limits = {"soft_timeout": 0.2, "hard_timeout": 0.6}
    others = {"soft_timeout": 30, "hard_timeout": 60}
    order = ["task", "queue", "app"]
    options = {
        name: ""
        if order.index(name) < order.index(level)
        else "".join(
            f", {key}={value}" for key, value in (limits if name == level else others).items()
        )
        for name in order
    }
    worker = start(
        APP.split("def compute", maxsplit=1)[0].replace(
            'queues=["default"]', f'queues=[Queue("default"{options["queue"]})]{options["app"]}'
        )
        + f"""
@wakaq.task({options["task"].removeprefix(", ")})
def slow():
    began = time.monotonic()
    try:
        time.sleep(60)
    except SoftTimeout:
        client.rpush("soft", time.monotonic() - began)
        time.sleep(60)
"""
    )
    worker.app.slow.delay()

    assert 0.2 <= float(popped(redis, 1, "soft")[0]) < 0.3
    assert letter_of(redis, eventually)["reason"] == "hard timeout"


def test_a_soft_timeout_in_a_destructor_is_not_lost(start, redis, eventually):
    worker = start(
        APP
        + """
class Slow:
    def __del__(self):
        time.sleep(0.5)

@wakaq.task(soft_timeout=0.2)
def drops():
    Slow()
    time.sleep(60)
"""
    )
    worker.app.drops.delay()

    assert letter_of(redis, eventually)["reason"] == "soft timeout"
