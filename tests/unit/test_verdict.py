"""What becomes of a task that did not just return, and what a dead letter keeps."""

import json

import pytest

from wakaq import SoftTimeout
from wakaq.errors import NotAMessage
from wakaq.letters import Letter
from wakaq.message import Message
from wakaq.settings import Policy
from wakaq.worker.verdict import failed, garbled, unknown

PAYLOAD = b'{"name": "task", "args": [1], "kwargs": {}, "future": "key"}'


def policy(most=2, on=(ValueError,), delay=0.0):
    return Policy(None, None, most, on, delay)


def judge(error, retry=0, **options):
    message = Message("task", [1], {}, retry=retry)
    return failed(PAYLOAD, message, policy(**options), error, "me")


def chained(error, **links):
    for name, link in links.items():
        setattr(error, name, link)
    return error


def test_a_retry_counts_and_keeps_what_it_does_not_know():
    verdict = judge(ValueError(), retry=1)

    assert (verdict.action, verdict.delay) == ("retry", 0.0)
    assert json.loads(verdict.new) == json.loads(PAYLOAD) | {"retry": 2}


@pytest.mark.parametrize(
    ("error", "retry", "on"),
    [
        (ValueError(), 2, (ValueError,)),
        (ValueError(), 3, (ValueError,)),
        (ValueError(), 0, (SoftTimeout,)),
        (ValueError(), 0, ()),
    ],
)
def test_without_a_retry_left_it_is_a_dead_letter(error, retry, on):
    verdict = judge(error, retry, on=on)
    letter = Letter.decode(verdict.new)

    assert verdict.action == "dead"
    assert (letter.payload, letter.reason, letter.worker) == (PAYLOAD, "raised", "me")
    assert "ValueError" in letter.traceback


@pytest.mark.parametrize(
    "error",
    [
        SoftTimeout(),
        chained(RuntimeError(), __cause__=SoftTimeout()),
        chained(RuntimeError(), __context__=SoftTimeout()),
        chained(RuntimeError(), __cause__=chained(KeyError(), __context__=SoftTimeout())),
    ],
)
def test_a_soft_timeout_in_the_chain_is_one(error):
    assert judge(error, on=(SoftTimeout,)).action == "retry"
    letter = Letter.decode(judge(error, retry=2, on=(SoftTimeout,)).new)
    assert letter.reason == "soft timeout"


def test_a_soft_timeout_that_was_dealt_with_is_none():
    error = chained(RuntimeError(), __context__=SoftTimeout(), __suppress_context__=True)

    assert judge(error, on=(SoftTimeout,)).action == "dead"


def test_a_chain_that_is_a_ring_ends():
    error = RuntimeError()
    error.__cause__ = chained(KeyError(), __cause__=error)

    assert judge(error, on=(SoftTimeout,)).action == "dead"


def test_equal_calls_that_are_delayed_stay_two():
    one, two = judge(ValueError(), delay=5.0), judge(ValueError(), delay=5.0)

    assert (one.action, one.delay) == ("delay", 5.0)
    assert one.new != two.new
    assert json.loads(one.new) == json.loads(two.new)


def test_a_function_is_told_the_retrys_number():
    assert judge(ValueError(), retry=1, delay=lambda retry: retry * 10.0).delay == 20.0


@pytest.mark.parametrize("bad", ["soon", -1, float("nan"), None])
def test_a_function_that_returns_no_duration_costs_only_the_delay(bad):
    assert judge(ValueError(), delay=lambda _: bad)[::2] == ("retry", 0.0)


def test_an_unknown_task_is_tried_again_later_and_then_dead():
    later = unknown(PAYLOAD, Message("task", [1], {}, redelivered=1), 2, "me")
    assert (later.action, later.delay) == ("delay", 30.0)
    assert json.loads(later.new)["redelivered"] == 2
    dead = unknown(PAYLOAD, Message("task", [1], {}, redelivered=2), 2, "me")

    assert Letter.decode(dead.new).reason == "unknown task"


def test_what_is_no_message_is_kept_to_the_byte():
    verdict = garbled(b"\xff\x00", NotAMessage("not JSON"), "me")
    letter = Letter.decode(verdict.new)

    assert verdict.action == "dead"
    assert (letter.payload, letter.reason) == (b"\xff\x00", "not a message")
    assert letter.traceback == "not JSON"


def test_of_a_long_traceback_the_end_is_kept():
    letter = Letter.decode(Letter(b"a", "raised", "x" * 20_000 + "the end", "me").encode())

    assert len(letter.traceback) == 8_000
    assert letter.traceback.endswith("the end")
    assert letter.at.endswith("+00:00")


@pytest.mark.parametrize("letter", [b"", b"[]", b"{}", b'{"payload": 3}', b"\xff"])
def test_what_is_no_letter_says_so_and_is_kept(letter):
    found = Letter.decode(letter)

    assert (found.reason, found.payload) == ("not a dead letter", letter)
