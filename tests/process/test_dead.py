"""`wakaq dead`: what it lists, puts back and drops."""

import json
import os
import pty
import sys
from subprocess import PIPE, Popen

import pytest

from wakaq.store.dead_letter import DeadLetter

APP = """
import os
from datetime import timedelta
from decimal import Decimal

import redis
from wakaq import WakaQ

wakaq = WakaQ(queues=["emails", "reports"], url=os.environ["REDIS_URL"], concurrency=1)


@wakaq.task(queue="emails")
def send(*args, **kwargs):
    with redis.Redis.from_url(os.environ["REDIS_URL"]) as client:
        if not client.exists("is-fine"):
            raise ValueError("the post office is closed")
        client.rpush("done", repr((args, kwargs)))
"""
DEAD = "wakaq:dead:emails"


def letter(payload: bytes) -> bytes:
    return DeadLetter(payload, "raised", "Traceback\nValueError: no", "host-1").encode()


def payload(number: int, rest: bytes = b"") -> bytes:
    # Spaced and ordered unlike ours, so that any encoding anew would show.
    return b'{"kwargs":{},  "name":"send","args":[%d,1.50, "\\u00e9"]%b}' % (number, rest)


@pytest.fixture
def letters(redis):
    """Five dead letters, 0 to 4."""
    for number in range(5):
        redis.lpush(DEAD, letter(payload(number)))


@pytest.fixture
def run(start):
    """Run a command to its end; returns exit status, stdout and stderr."""
    app = None

    def run(command: str, *options: str) -> tuple[int, str, str]:
        nonlocal app
        started = start(app or APP, command, "--queue=emails", *options)
        app = started.app
        return started.wait(), started.output, started.log

    return run


def test_a_dead_letter_put_back_runs_with_its_arguments_unchanged(start, run, redis, eventually):
    worker = start(APP)
    module = worker.app
    arguments = [module.Decimal("1.10"), b"\0\xff", module.timedelta(days=1, microseconds=5), "é\n"]
    module.send.delay(*arguments, big=2**70, empty=[])
    eventually(lambda: redis.llen(DEAD) == 1)
    status, shown, _ = run("dead list")

    assert status == 0
    assert "the post office is closed" in shown
    assert "raised, " in shown
    assert "Queue 'emails' has 1 dead letters" in shown

    redis.set("is-fine", 1)
    assert run("dead retry", "0")[:2] == (0, "Put 1 of 1 tasks back into queue 'emails'\n")

    _, call = redis.blpop("done", timeout=5)
    assert call.decode() == repr((tuple(arguments), {"big": 2**70, "empty": []}))
    assert redis.llen(DEAD) == 0
    assert worker.stop() == 0


def test_a_retry_keeps_every_byte_and_starts_counts_anew(run, redis):
    plain, counted = payload(1), payload(2, b',"retry":3,"redelivered":1,"theirs":7')
    garbage = b"\xff no message"
    for one in (plain, counted, garbage):
        redis.lpush(DEAD, letter(one))
    redis.rpush("wakaq:emails", b"first")

    assert run("dead retry")[0] == 0

    first, second, third, fourth = redis.lrange("wakaq:emails", 0, -1)
    assert (first, second, fourth) == (b"first", plain, garbage)
    assert json.loads(third) == {**json.loads(payload(2)), "theirs": 7}


@pytest.mark.usefixtures("letters")
def test_the_list_is_newest_first_and_numbers_stay_when_letters_arrive(run, redis):
    redis.lpush(DEAD, letter(payload(5)))
    status, shown, _ = run("dead list", "--json", "--limit=2")
    found = [json.loads(line) for line in shown.splitlines()]

    assert status == 0
    assert [one["index"] for one in found] == [5, 4]
    assert found[0]["payload"].encode() == payload(5)
    assert found[0].keys() == {"index", "reason", "at", "worker", "traceback", "payload"}

    assert run("dead retry", "3", "1", "3")[1] == "Put 2 of 2 tasks back into queue 'emails'\n"
    assert redis.lrange("wakaq:emails", 0, -1) == [payload(1), payload(3)]
    assert redis.llen(DEAD) == 4


@pytest.mark.usefixtures("letters")
def test_an_index_that_is_gone_is_one_line_and_nothing_is_put_back(run, redis):
    status, shown, error = run("dead retry", "4", "5")

    assert (status, shown) == (2, "")
    assert error == "wakaq: dead letter 5 of queue 'emails' is gone; there are 0 to 4\n"
    assert redis.llen(DEAD) == 5
    assert not redis.exists("wakaq:emails")


def test_an_index_where_there_are_none_says_so(run):
    assert run("dead purge", "0")[2].endswith("'emails' is gone; there are none\n")


@pytest.mark.usefixtures("letters")
def test_a_purge_drops_what_it_is_told_and_says_how_many(run, redis):
    assert run("dead purge", "0", "4")[:2] == (0, "Dropped 2 dead letters of queue 'emails'\n")
    kept = [DeadLetter.decode(one).payload for one in redis.lrange(DEAD, 0, -1)]
    assert kept == [payload(number) for number in (3, 2, 1)]

    assert run("dead purge")[:2] == (0, "Dropped 3 dead letters of queue 'emails'\n")
    assert redis.keys() == []


def test_what_is_no_dead_letter_is_shown_and_can_be_dropped(run, redis):
    redis.lpush(DEAD, b"\xff\x00")
    status, shown, _ = run("dead list")

    assert status == 0
    assert "0  b'\\xff\\x00'" in shown
    assert "not a dead letter" in shown
    assert run("dead purge", "0")[0] == 0
    assert not redis.exists(DEAD)


def test_many_letters_are_listed_over_several_pages(run, redis):
    redis.lpush(DEAD, *[letter(payload(number)) for number in range(250)])
    _, shown, _ = run("dead list", "--limit=249", "--json")
    found = [json.loads(line) for line in shown.splitlines()]

    assert [one["index"] for one in found] == list(range(249, 0, -1))
    assert [json.loads(one["payload"])["args"][0] for one in found] == list(range(249, 0, -1))


@pytest.mark.usefixtures("letters")
@pytest.mark.parametrize(
    ("command", "answer", "status", "left"),
    [
        ("dead purge", b"n\n", 1, 5),
        ("dead purge", b"y\n", 0, 0),
        ("dead purge --yes", b"", 0, 0),
        ("dead retry", b"n\n", 1, 5),
        ("dead retry --yes", b"", 0, 0),
        ("dead retry 2", b"", 0, 4),
    ],
)
def test_a_terminal_is_asked_before_anything_is_dropped(  # noqa: PLR0913, PLR0917 - a table
    load_app, redis, tmp_path, command, answer, status, left
):
    load_app(APP)
    ours, theirs = pty.openpty()
    options = ["--app=app.wakaq", "--queue=emails"]
    line = [sys.executable, "-m", "wakaq", *command.split(), *options]
    with Popen(line, cwd=tmp_path, stdin=theirs, stdout=PIPE, stderr=PIPE) as process:
        os.close(theirs)
        os.write(ours, answer)
        _, errors = process.communicate(timeout=10)
    os.close(ours)

    assert process.returncode == status
    assert (b"5" in errors) == bool(answer)
    assert redis.llen(DEAD) == left
