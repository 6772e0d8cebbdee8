"""Starting `wakaq worker`.

What it says about an application, a Redis or a worker that cannot be used; and many workers.
"""

import json
import os
import re
import socket
import time

import psutil
import pytest

from wakaq.worker import outcome

APP = """
import os
import redis
from wakaq import WakaQ
client = redis.Redis.from_url(os.environ["REDIS_URL"])
wakaq = WakaQ(queues=["default"], concurrency=1, url=os.environ["REDIS_URL"], wait_timeout=0.2)

@wakaq.task
def note(name):
    client.rpush("done", name)
"""
EMPTY = """
import os
from wakaq import WakaQ
wakaq = WakaQ(queues=["default"], concurrency=100, url=os.environ["REDIS_URL"], wait_timeout=0.2)
"""


def fails(command, status=2):
    """Return the one line that a command ends with."""
    assert command.wait(10) == status
    assert "Traceback" not in command.log
    lines = command.log.strip().splitlines()
    assert len(lines) == 1, command.log
    return lines[0]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("nothing_here.wakaq", "no module named 'nothing_here'"),
        ("app.wakak", r"no such variable; did you mean '?(app\.)?wakaq"),
        ("app.client", r"no WakaQ but (a )?Redis; did you mean '?(app\.)?wakaq"),
        ("app", "write package.module.variable"),
        ("app:", "write package.module.variable"),
        ("bad.wakaq", "its import fails at .*bad.py:1: ZeroDivisionError: division by zero"),
        ("lacks.wakaq", "its import fails at .*lacks.py:1: .*No module named 'not_installed'"),
    ],
)
def test_an_app_that_cannot_be_used_is_named_in_one_line(start, tmp_path, path, says):
    (tmp_path / "bad.py").write_text("1 / 0")
    (tmp_path / "lacks.py").write_text("import not_installed")
    worker = start(APP, "worker", f"--app={path}")

    line = fails(worker)
    assert f"--app={path!r}: " in line
    assert re.search(says, line), line


def test_an_app_has_to_be_named(start):
    worker = start(APP, "worker", "--app")

    assert worker.wait() == 2
    assert "--app" in worker.log
    assert "Traceback" not in worker.log


def test_a_redis_that_is_not_there_is_one_line(start):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"redis://127.0.0.1:{probe.getsockname()[1]}"
        worker = start(APP, url=url)

        line = fails(worker)
        assert "Redis cannot be used" in line
        assert "refused" in line


def test_a_wrong_password_is_one_line_that_does_not_show_it(start, redis_tcp_server):
    url = f"redis://:wr0ng@127.0.0.1:{redis_tcp_server.port}"
    worker = start(APP, url=url)

    line = fails(worker)
    assert "WRONGPASS" in line or "invalid username-password pair" in line
    assert "wr0ng" not in line


def test_workers_that_cannot_start_stop_the_supervisor_with_the_reason(start, eventually):
    worker = start(
        APP
        + """
@wakaq.after_worker_started
def connect():
    raise RuntimeError("no such database")
"""
    )

    assert worker.wait() == 3
    assert "cannot start: RuntimeError: no such database" in worker.log
    assert "Workers cannot start, see above: stopping" in worker.log
    eventually(lambda: not worker.processes())


def test_workers_that_die_while_they_start_stop_the_supervisor(start):
    worker = start(
        APP
        + """
@wakaq.after_worker_started
def connect():
    os._exit(9)
"""
    )

    assert worker.wait() == 3
    assert "exited with status 9" in worker.log


def test_a_worker_that_cannot_start_later_is_tried_again_ever_more_slowly(
    start, redis, eventually, tmp_path
):
    worker = start(
        APP
        + """
@wakaq.after_worker_started
def connect():
    if os.path.exists("broken"): raise RuntimeError("gone")
"""
    )
    (pid,) = worker.workers(1)
    (tmp_path / "broken").touch()
    os.kill(pid, 9)

    eventually(lambda: "next try in 2 s" in worker.log)
    assert "next try in 1 s" in worker.log
    (tmp_path / "broken").unlink()
    worker.app.note.delay("healed")
    assert redis.blpop("done", timeout=5)
    assert worker.stop() == 0


@pytest.mark.parametrize(
    "payload",
    [
        b"nonsense",
        b"{}",
        b'{"args": []}',
        b"\xff\xfe",
        b'{"name": 3}',
        b'{"name": "note", "args": 1}',
    ],
)
def test_a_payload_that_is_no_message_becomes_a_dead_letter_and_the_worker_goes_on(
    start, redis, eventually, payload
):
    worker = start(APP)
    redis.rpush("wakaq:default", payload)
    worker.app.note.delay("next")

    assert redis.blpop("done", timeout=5)[1] == b"next"
    (letter,) = redis.lrange("wakaq:dead:default", 0, -1)
    assert json.loads(letter)["reason"] == "not a message"
    eventually(lambda: "A payload is no message" in worker.log)
    assert worker.stop() == 0
    assert redis.keys("wakaq:inflight:*") == []


def test_an_unknown_task_is_tried_again_later_and_then_dead(start, redis, eventually, monkeypatch):
    # Set by the application, which is imported here, too.
    monkeypatch.setattr(outcome, "UNKNOWN_DELAY", outcome.UNKNOWN_DELAY)
    worker = start("from wakaq.worker import outcome\noutcome.UNKNOWN_DELAY = 0.1\n" + APP)
    redis.rpush("wakaq:default", b'{"name": "newer", "args": [1], "kwargs": {}}')

    eventually(lambda: redis.llen("wakaq:dead:default") == 1)
    letter = json.loads(redis.lindex("wakaq:dead:default", 0))
    assert letter["reason"] == "unknown task"
    payload = json.loads(letter["payload"])
    assert payload == {"name": "newer", "args": [1], "kwargs": {}, "unknown": 3}
    assert worker.log.count("Task newer is unknown: trying again") == 3


def test_arguments_that_cannot_be_sent_are_refused_by_the_call(start, redis):
    app = start(APP).app
    for argument in (object(), float("nan"), {1: 2j}):
        with pytest.raises((TypeError, ValueError)):
            app.note.delay(argument)

    assert redis.llen("wakaq:default") == 0


@pytest.mark.timeout(60)
def test_a_hundred_workers_start_in_under_ten_seconds_and_are_small(start):
    began = time.monotonic()
    worker = start(EMPTY)
    pids = worker.workers(100, within=20)
    took = time.monotonic() - began
    pss = [psutil.Process(pid).memory_full_info().pss / 1e6 for pid in pids]

    assert took < 10
    assert max(pss) < 15, sorted(pss)
    assert worker.stop(within=20) == 0
