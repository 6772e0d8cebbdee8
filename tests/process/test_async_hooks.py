"""What surrounds async tasks.

Hooks and wrappers of both kinds, contexts, and the lines they log.
"""

import json
import re

import pytest

APP = """
import asyncio, contextvars, inspect, logging, os, time
from wakaq import WakaQ

wakaq = WakaQ(
    queues=["default"], url=os.environ["REDIS_URL"], wait_timeout=0.2, concurrency=1
)
client = wakaq.broker.client

def say(*words):
    client.rpush("said", " ".join(map(str, words)))

def loop():
    return id(asyncio.get_running_loop())

@wakaq.task
async def asynchronous(word="async"):
    say(word, "begins")
    await asyncio.sleep(0.01)
    say(word, "ends")

@wakaq.task
def synchronous(word="sync"):
    say(word, "runs")

@wakaq.task
async def fails():
    say("fails")
    raise ValueError("no luck")
"""


def take(redis, count, key="said", within=10):
    """Wait for the next `count` elements of a list."""
    found = []
    for _ in range(count):
        element = redis.blpop(key, timeout=within)
        assert element, f"only {len(found)} of {count} came: {found}"
        found.append(element[1].decode())
    return found


@pytest.fixture
def letter(redis, eventually):
    """Return a function that waits for the one dead letter."""

    def read():
        eventually(lambda: redis.llen("wakaq:dead:default") == 1, within=10)
        return json.loads(redis.lindex("wakaq:dead:default", 0))

    return read


HOOKS = (
    APP
    + """
@wakaq.after_worker_started
async def open_pool():
    global pool
    pool = asyncio.get_running_loop(), asyncio.Queue()
    pool[1].put_nowait("a connection")
    say("opened")

@wakaq.before_task_started
async def before():
    assert asyncio.get_running_loop() is pool[0]
    say("before")

@wakaq.before_task_started
def before_sync():
    say("before, too")

@wakaq.after_task_finished
async def after():
    await asyncio.sleep(0)
    assert asyncio.get_running_loop() is pool[0]
    say("after")

@wakaq.after_task_finished
def after_sync():
    say("after, too")

@wakaq.task
async def use_pool():
    assert asyncio.get_running_loop() is pool[0]
    connection = await pool[1].get()
    say(connection)
"""
)


def test_async_hooks_run_on_the_loop_of_the_tasks_around_tasks_of_both_kinds(start, redis):
    worker = start(HOOKS)
    assert take(redis, 1) == ["opened"]
    around = ["before", "before, too", ..., "after", "after, too"]

    worker.app.use_pool.delay()
    assert take(redis, 5) == [word if word is not ... else "a connection" for word in around]
    worker.app.synchronous.delay()
    assert take(redis, 5) == [word if word is not ... else "sync runs" for word in around]
    worker.app.fails.delay()
    assert take(redis, 5) == [word if word is not ... else "fails" for word in around]
    assert worker.stop() == 0
    assert redis.hgetall("wakaq:stats:default") == {b"done": b"2", b"dead": b"1"}


def test_a_hook_that_fails_before_a_task_fails_the_task_and_after_it_only_the_log(
    start, redis, letter
):
    worker = start(
        APP
        + """
@wakaq.before_task_started
async def before():
    if client.incr("calls") == 1:
        raise RuntimeError("no connection")

@wakaq.after_task_finished
async def after():
    raise RuntimeError("cannot close")
"""
    )
    worker.app.asynchronous.delay()
    assert "RuntimeError: no connection" in letter()["traceback"]
    assert redis.llen("said") == 0
    worker.app.asynchronous.delay()

    assert take(redis, 2) == ["async begins", "async ends"]
    assert worker.stop() == 0
    assert worker.log.count("RuntimeError: cannot close") == 2
    assert redis.hgetall("wakaq:stats:default") == {b"done": b"1", b"dead": b"1"}


def test_an_async_hook_that_fails_at_the_start_ends_the_command_with_its_reason(start):
    worker = start(
        APP
        + """
@wakaq.after_worker_started
async def open_pool():
    await asyncio.sleep(0)
    raise RuntimeError("no database")
"""
    )

    assert worker.wait() == 3
    assert "cannot start: RuntimeError: no database" in worker.log


DECORATOR = """
@wakaq.wrap_tasks_with
def wrapper(fn):
    async def run_async(*args, **kwargs):
        say("enter")
        await fn(*args, **kwargs)
        say("leave")
    def run(*args, **kwargs):
        say("enter")
        fn(*args, **kwargs)
        say("leave")
    return run_async if inspect.iscoroutinefunction(fn) else run
"""
CALL = """
@wakaq.wrap_tasks_with
async def wrapper(fn, args, kwargs):
    say("enter")
    result = fn(*args, **kwargs)
    if inspect.isawaitable(result):
        await result
    say("leave")
"""
PASSING_ON = """
@wakaq.wrap_tasks_with
def wrapper(fn, args, kwargs):
    say("enter")
    return fn(*args, **kwargs)
"""


@pytest.mark.parametrize(
    ("wrapper", "last"), [(DECORATOR, ["leave"]), (CALL, ["leave"]), (PASSING_ON, [])]
)
def test_wrappers_of_every_form_surround_tasks_of_both_kinds(start, redis, wrapper, last):
    worker = start(APP + wrapper)
    worker.app.asynchronous.delay()
    assert take(redis, 3 + len(last)) == ["enter", "async begins", "async ends", *last]
    worker.app.synchronous.delay()
    assert take(redis, 2 + len(last)) == ["enter", "sync runs", *last]
    assert worker.stop() == 0
    assert redis.hgetall("wakaq:stats:default") == {b"done": b"2"}


@pytest.mark.parametrize(
    "wrapper",
    [
        (
            "def wrapper(fn):\n    def run(*args, **kwargs):\n"
            "        fn(*args, **kwargs)\n    return run"
        ),
        "def wrapper(fn, args, kwargs):\n    fn(*args, **kwargs)",
        "async def wrapper(fn, args, kwargs):\n    fn(*args, **kwargs)",
    ],
)
def test_a_wrapper_that_drops_the_awaitable_is_a_dead_letter_that_says_how_to_write_it(
    start, redis, letter, wrapper
):
    worker = start(f"{APP}\n@wakaq.wrap_tasks_with\n{wrapper}\n")
    worker.app.asynchronous.delay()

    assert "WakaQError: the wrapper of task 'asynchronous' did not run it" in letter()["traceback"]
    assert "return fn(*args, **kwargs)" in letter()["traceback"]
    assert worker.stop() == 0
    assert redis.hgetall("wakaq:stats:default") == {b"dead": b"1"}
    assert redis.llen("said") == 0


CONTEXTS = (
    APP
    + """
user = contextvars.ContextVar("user", default="nobody")

@wakaq.after_worker_started
def set_default():
    user.set("from the hook")

@wakaq.task
async def mine(number):
    seen = user.get()
    user.set(number)
    await asyncio.sleep(0.05 + number % 3 / 50)
    say(seen, number if user.get() == number else "mixed up")

@wakaq.task
def pollute():
    user.set("a sync task")
    say("polluted")
"""
)


def test_what_a_task_sets_in_its_context_no_other_sees(start, redis):
    worker = start(CONTEXTS)
    worker.app.pollute.delay()
    assert take(redis, 1) == ["polluted"]
    for number in range(100):
        worker.app.mine.delay(number)

    expected = [f"from the hook {number}" for number in range(100)]
    assert sorted(take(redis, 100)) == sorted(expected)
    assert worker.stop() == 0


def test_each_line_of_the_log_names_the_task_that_wrote_it(start, redis):
    worker = start(
        APP
        + """
@wakaq.task
async def speak(number, *, tone="low"):
    for _ in range(3):
        await asyncio.sleep(0.01)
        logging.getLogger("shop").warning("line of %d", number)
    async def part():
        logging.getLogger("shop").warning("line of %d", number)
    await asyncio.gather(part(), part())
    say("spoke")
"""
    )
    for number in range(30):
        worker.app.speak.delay(number, tone="high")
    take(redis, 30)
    assert worker.stop() == 0

    pattern = r"in speak args=\[(\d+)\] kwargs={'tone': 'high'} retry=0: line of (\d+)"
    pairs = re.findall(pattern, worker.log)
    assert len(pairs) == worker.log.count("line of") == 150
    assert all(own == said for own, said in pairs)
