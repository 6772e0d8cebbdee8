"""Tasks that fork: what they have forked ends as their child, and reports nothing."""

import pytest

APP = """
import asyncio, os, sys
from wakaq import WakaQ

wakaq = WakaQ(queues=["default"], concurrency=1, url=os.environ["REDIS_URL"], wait_timeout=0.2)
client = wakaq.broker.client

def fork(how):
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        client.rpush("done", f"{how} {status}")
    elif how == "exit":
        sys.exit(7)
    elif how == "raise":
        raise ValueError(how)

@wakaq.task
def sync(how):
    fork(how)

@wakaq.task
async def coroutine(how):
    fork(how)

@wakaq.task
def note():
    client.rpush("done", "next")

@wakaq.before_task_started
def before():
    if os.path.exists("fork in hook"):
        os.unlink("fork in hook")
        fork("exit")

@wakaq.after_task_finished
def after():
    with open("hooks", "a") as file:
        file.write(f"{os.getpid()}\\n")
"""


def take(redis, count):
    elements = [redis.blpop("done", timeout=10) for _ in range(count)]
    assert all(elements), f"only these came: {elements}"
    return [element[1].decode() for element in elements]


@pytest.mark.parametrize("how", ["exit 7", "return 0", "raise 1"])
@pytest.mark.parametrize("kind", ["sync", "coroutine"])
def test_what_a_task_has_forked_ends_and_reports_nothing(start, redis, tmp_path, kind, how):
    worker = start(APP)
    (pid,) = worker.workers()
    getattr(worker.app, kind).delay(how.split()[0])
    assert take(redis, 1) == [how]
    worker.app.note.delay()
    assert take(redis, 1) == ["next"]

    assert worker.workers() == [pid]
    assert worker.stop() == 0
    assert (tmp_path / "hooks").read_text().split() == [str(pid)] * 2
    assert redis.hgetall("wakaq:stats:default") == {b"done": b"2"}


@pytest.mark.parametrize("kind", ["sync", "coroutine"])
def test_what_a_hook_has_forked_ends_as_well(start, redis, tmp_path, kind):
    worker = start(APP)
    (pid,) = worker.workers()
    (tmp_path / "fork in hook").touch()
    getattr(worker.app, kind).delay("return")
    assert take(redis, 2) == ["exit 7", "return 0"]

    assert worker.workers() == [pid]
    assert worker.stop() == 0
    assert redis.hgetall("wakaq:stats:default") == {b"done": b"1"}
