"""`wakaq-info`: what it counts, for people and for programs, and that it stays quick."""

import json
import os
import pty
import re
import sys
from datetime import timedelta
from subprocess import Popen

import pytest

APP = """
import os

import redis
from wakaq import WakaQ

wakaq = WakaQ(
    queues=[(0, "payments"), (1, "emails"), "reports"], url=os.environ["REDIS_URL"], concurrency=2
)


@wakaq.task(queue="emails")
def hold(name):
    with redis.Redis.from_url(os.environ["REDIS_URL"], socket_timeout=60) as client:
        client.rpush("started", name)
        client.blpop("release")


@wakaq.task
def fail():
    raise ValueError


@wakaq.task
def succeed(): ...
"""


@pytest.fixture
def busy(start, redis):
    """A worker with two processes, both of which run a task until the test ends."""
    worker = start(APP)
    for name in ("one", "two"):
        worker.app.hold.delay(name)
        assert redis.blpop("started", timeout=10)
    yield worker
    redis.rpush("release", 1, 2)
    assert worker.stop() == 0


def look(start, app) -> dict:
    command = start(app, "info", "--json")
    assert command.wait() == 0
    return json.loads(command.output)


def test_programs_get_the_keys_that_they_know(start, load_app):
    app = load_app(APP)
    app.hold.delay("x")
    app.hold.delay("y", eta=timedelta(hours=1))
    found = look(start, app)

    assert list(found["queues"]) == ["payments", "emails", "reports"]
    assert found["workers"] == 0
    assert found["queues"]["emails"] == {
        "name": "emails",
        "priority": 1,
        "broker_key": "wakaq:emails",
        "broker_eta_key": "wakaq:eta:emails",
        "pending_tasks": 1,
        "pending_eta_tasks": 1,
        "inflight_tasks": 0,
        "dead_letters": 0,
        "stats": {"done": 0, "retried": 0, "dead": 0, "redelivered": 0},
    }
    assert found["queues"]["reports"]["priority"] is None


def test_what_runs_is_in_flight_and_shown_with_its_worker(start, busy, eventually):
    def both_are_seen() -> dict:
        found = look(start, busy.app)
        (supervisor,) = found["supervisors"]
        names = [task["name"] for child in supervisor["children"] for task in child["tasks"]]
        assert sorted(names) == ["hold('one')", "hold('two')"]
        return found

    found = eventually(both_are_seen, within=10)

    assert found["workers"] == 1
    assert found["queues"]["emails"]["inflight_tasks"] == 2
    (supervisor,) = found["supervisors"]
    assert supervisor["pid"] == busy.pid
    assert {child["pid"] for child in supervisor["children"]} == set(busy.workers(2))
    assert all(child["rss"] > 1_000_000 for child in supervisor["children"])

    command = start(busy.app, "info")
    assert command.wait() == 0
    shown = command.output
    assert re.search(r"^emails +1 +0 +0 +2 +0 +0 +0$", shown, re.MULTILINE)
    assert re.search(r" +[12] +hold\('one'\) +\d+ s +\d+$", shown, re.MULTILINE)
    assert max(map(len, shown.splitlines())) <= 80


def test_done_and_dead_tasks_are_counted(start, eventually):
    worker = start(APP)
    for _ in range(3):
        worker.app.succeed.delay()
    worker.app.fail.delay()

    def all_are_counted() -> None:
        reports = look(start, worker.app)["queues"]["reports"]
        assert reports["stats"] == {"done": 3, "retried": 0, "dead": 1, "redelivered": 0}
        assert reports["dead_letters"] == 1

    eventually(all_are_counted, within=10)
    assert worker.stop() == 0
    assert look(start, worker.app)["workers"] == 0


def test_entries_that_are_no_supervisor_are_passed_over(start, load_app, redis):
    entry = {"beat": 1, "concurrency": 1, "children": [], "host": "h"}
    redis.hset("wakaq:registry:workers", "garbage", b"\xff")
    redis.hset("wakaq:registry:workers", "list", b"[1]")
    redis.hset("wakaq:registry:workers", "dead:a", json.dumps(entry))
    redis.hset("wakaq:registry:workers", "a-orphan-1", json.dumps({"beat": 1, "concurrency": 1}))
    redis.hset("wakaq:registry:workers", "b", json.dumps(entry))
    redis.rpush("wakaq:inflight:emails:a-orphan-1:1", b"x")
    redis.rpush("wakaq:inflight:emails:b:0", b"x", b"y")
    found = look(start, load_app(APP))

    assert [one["id"] for one in found["supervisors"]] == ["b"]
    assert found["queues"]["emails"]["inflight_tasks"] == 3


def test_what_a_wake_up_has_moved_waits_and_what_a_hash_holds_is_in_flight(start, load_app, redis):
    entry = {"beat": 1, "concurrency": 1, "keys": [], "children": [], "host": "h"}
    redis.hset("wakaq:registry:workers", "a", json.dumps(entry))
    redis.hset("wakaq:inflight:emails:a", mapping={"7": b"x", "9": b"y"})
    redis.rpush("wakaq:emails", b"second", b"third")
    redis.rpush("wakaq:head:emails", b"first")
    found = look(start, load_app(APP))

    assert found["queues"]["emails"]["pending_tasks"] == 3
    assert found["queues"]["emails"]["inflight_tasks"] == 2
    assert found["supervisors"][0].keys() == {
        *("id", "beat", "host", "pid", "same_host", "concurrency", "queues", "children")
    }


def test_a_million_tasks_and_a_hundred_workers_are_counted_at_once(start, load_app, redis):
    script = "for i = 1, 1000 do redis.call('RPUSH', KEYS[1], unpack(cjson.decode(ARGV[1]))) end"
    redis.eval(script, 1, "wakaq:emails", json.dumps(["x" * 50] * 1000))
    children = [{"number": n, "pid": n, "rss": 1e7, "tasks": []} for n in range(1, 11)]
    for number in range(10):
        entry = {"beat": 1, "concurrency": 10, "children": children, "host": "h", "pid": number}
        redis.hset("wakaq:registry:workers", f"s{number}", json.dumps(entry))
    app = load_app(APP)
    redis.config_resetstat()
    found = look(start, app)
    used = {name.removeprefix("cmdstat_") for name in redis.info("commandstats")}

    assert found["queues"]["emails"]["pending_tasks"] == 1_000_000
    assert found["workers"] == 10
    # None of these takes longer the more tasks wait; HGETALL reads the registry and the counters.
    connecting = {"client|setinfo", "config|resetstat", "hello", "info", "ping"}
    assert used - connecting == {"hgetall", "llen", "zcard"}


def test_watching_needs_a_terminal(start):
    command = start(APP, "info", "--watch")

    assert command.wait() == 2
    assert command.log == "wakaq: --watch needs a terminal; for programs there is --json\n"


def test_a_terminal_is_refreshed_until_ctrl_c(load_app, redis, tmp_path):
    app = load_app(APP)
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "30"}
    line = [sys.executable, "-m", "wakaq", "info", "--watch", "--app=app.wakaq"]
    with Popen(
        line, cwd=tmp_path, env=environment, stdin=theirs, stdout=theirs, start_new_session=True
    ) as process:
        os.close(theirs)
        seen = read_until(ours, "failed")
        app.hold.delay("x")
        redis.hset("wakaq:stats:reports", "done", 500)
        seen += read_until(ours, "done/s +[1-9][0-9]* ")
        process.send_signal(2)
        read_until(ours, None)
        status = process.wait(10)
    os.close(ours)

    assert status == 0
    assert re.search(r"pending +1 +.*█", seen)


def read_until(fd: int, pattern: str | None) -> str:
    """Read from a terminal until a pattern is in it, or its end."""
    seen = ""
    while pattern is None or not re.search(pattern, seen):
        try:
            seen += os.read(fd, 65536).decode(errors="replace")
        except OSError:  # nobody has the other end any more
            assert pattern is None, seen
            break
    return seen
