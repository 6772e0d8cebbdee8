"""What becomes of a claimed payload whose task did not just return."""

import json
import logging
from types import SimpleNamespace

import pytest

from wakaq import SoftTimeout
from wakaq import message as message_module
from wakaq.errors import NotAMessage
from wakaq.message import Message
from wakaq.settings import Policy
from wakaq.store.dead_letter import DeadLetter
from wakaq.store.settlement import REQUEUE, Action
from wakaq.worker import outcome

PAYLOAD = b'{"name": "task", "args": [1], "kwargs": {}, "future": "key"}'


def policy(most=2, on=(ValueError,), delay=0.0):
    return Policy(None, None, most, on, delay)


def failed(error, retry=0, **options):
    message = Message("task", [1], {}, retry=retry)
    return outcome.failed(PAYLOAD, message, policy(**options), error, "me")


def letter_of(settlement):
    assert settlement.action is Action.DEAD
    return DeadLetter.decode(settlement.payload)


def with_count(count):
    return json.dumps(json.loads(PAYLOAD) | {"redelivered": count}).encode()


def chained(error, **links):
    for name, link in links.items():
        setattr(error, name, link)
    return error


# -- a task that raised ----------------------------------------------------------------------------


def test_a_retry_counts_and_keeps_what_it_does_not_know():
    settlement = failed(ValueError(), retry=1)

    assert (settlement.action, settlement.delay) == (Action.RETRY, 0.0)
    assert json.loads(settlement.payload) == json.loads(PAYLOAD) | {"retry": 2}


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
    letter = letter_of(failed(error, retry, on=on))

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
    assert failed(error, on=(SoftTimeout,)).action is Action.RETRY
    assert letter_of(failed(error, retry=2, on=(SoftTimeout,))).reason == "soft timeout"


def test_a_soft_timeout_that_was_dealt_with_is_none():
    error = chained(RuntimeError(), __context__=SoftTimeout(), __suppress_context__=True)

    assert failed(error, on=(SoftTimeout,)).action is Action.DEAD


def test_a_chain_that_is_a_ring_ends():
    error = RuntimeError()
    error.__cause__ = chained(KeyError(), __cause__=error)

    assert failed(error, on=(SoftTimeout,)).action is Action.DEAD


def test_equal_calls_that_are_delayed_stay_two():
    one, two = failed(ValueError(), delay=5.0), failed(ValueError(), delay=5.0)

    assert (one.action, one.delay) == (Action.DELAY, 5.0)
    assert one.payload != two.payload
    assert json.loads(one.payload) == json.loads(two.payload)


def test_a_function_is_told_the_retrys_number():
    assert failed(ValueError(), retry=1, delay=lambda retry: retry * 10.0).delay == 20.0


@pytest.mark.parametrize("bad", ["soon", -1, float("nan"), None])
def test_a_function_that_returns_no_duration_costs_only_the_delay(bad):
    assert failed(ValueError(), delay=lambda _: bad)[::2] == (Action.RETRY, 0.0)


def test_a_log_that_raises_does_not_change_what_was_decided():
    class Bad(logging.Handler):
        def handle(self, _record):
            raise OSError("the disk is full")

    handler = Bad()
    outcome.logger.addHandler(handler)
    try:
        assert failed(ValueError(), retry=1).action is Action.RETRY
        assert failed(ValueError(), retry=2).action is Action.DEAD
    finally:
        outcome.logger.removeHandler(handler)


# -- what cannot be run ----------------------------------------------------------------------------


def test_an_unknown_task_is_tried_again_later_and_then_dead():
    later = outcome.unknown(PAYLOAD, Message("task", [1], {}, unknown=1), 2, "me")
    assert (later.action, later.delay) == (Action.DELAY, 30.0)
    assert json.loads(later.payload) == json.loads(PAYLOAD) | {"unknown": 2}
    dead = outcome.unknown(PAYLOAD, Message("task", [1], {}, unknown=2), 2, "me")

    assert letter_of(dead).reason == "unknown task"


def test_an_unknown_task_is_no_suspect_and_keeps_its_redeliveries():
    later = outcome.unknown(PAYLOAD, Message("task", [1], {}, redelivered=0), 2, "me")
    suspect = outcome.unknown(with_count(2), Message("task", [1], {}, redelivered=2), 2, "me")

    assert not outcome.is_suspect(later.payload)
    assert Message.decode(suspect.payload) == Message("task", [1], {}, redelivered=2, unknown=1)


def test_that_a_task_was_unknown_is_forgotten_once_it_ran():
    message = Message("task", [1], {}, unknown=2)
    died = outcome.died(message.encode(), 3, "its worker died", "me")
    retried = outcome.failed(message.encode(), message, policy(), ValueError(), "me")

    assert Message.decode(died.payload) == Message("task", [1], {}, redelivered=1)
    assert Message.decode(retried.payload) == Message("task", [1], {}, retry=1)
    assert Message.decode(outcome.rescued(message.encode())).unknown == 2


def test_what_is_no_message_is_kept_to_the_byte():
    letter = letter_of(outcome.malformed(b"\xff\x00", NotAMessage("not JSON"), "me"))

    assert (letter.payload, letter.reason) == (b"\xff\x00", "not a message")
    assert letter.traceback == "not JSON"


def test_what_was_rescued_too_often_is_a_dead_letter_that_tells_how_often():
    letter = letter_of(outcome.exhausted(with_count(4), Message("task", [1], {}, 0, 4), "me"))

    assert (letter.reason, letter.payload) == ("redelivered too often", with_count(4))
    assert letter.traceback == "its worker, or its machine, died 4 times"


# -- a process that died ---------------------------------------------------------------------------


def test_a_death_counts_and_keeps_what_it_does_not_know():
    settlement = outcome.died(PAYLOAD, 3, "its worker died", "me")

    assert settlement.action is Action.REDELIVER
    assert settlement.payload == with_count(1)


@pytest.mark.parametrize(("before", "most"), [(0, 0), (3, 3), (5, 3)])
def test_a_task_that_takes_too_many_workers_along_is_given_up_and_that_is_logged(
    caplog, before, most
):
    payload = with_count(before) if before else PAYLOAD
    letter = letter_of(outcome.died(payload, most, "it took too much memory", "me"))

    assert (letter.reason, letter.payload) == ("redelivered too often", payload)
    assert letter.traceback == f"it took too much memory, {before + 1} times in all"
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_a_payload_that_is_no_message_is_put_back_when_its_worker_died():
    assert outcome.died(b"\xff", 3, "its worker died", "me") == REQUEUE


def test_a_hard_timeout_is_a_dead_letter_with_the_stacks():
    letter = letter_of(outcome.hard_timeout(PAYLOAD, "in time.sleep", "me"))

    assert (letter.reason, letter.payload) == ("hard timeout", PAYLOAD)
    assert letter.traceback == "in time.sleep"


def test_a_rescue_counts_and_keeps_what_it_does_not_know():
    assert outcome.rescued(PAYLOAD) == with_count(1)
    assert outcome.rescued(with_count(1)) == with_count(2)
    assert outcome.rescued(b"\xff") == b"\xff"


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (PAYLOAD, False),
        (with_count(0), False),
        (with_count(1), True),
        (b'{"name": "task", "args": ["\\"redelivered\\""]}', False),
        (b'{"name": "task", "args": [{"redelivered": 1}]}', False),
        (b'{"redelivered": 1}', False),
        (b'"redelivered" \xff', False),
    ],
)
def test_a_suspect_is_what_counts_a_death(payload, expected):
    assert outcome.is_suspect(payload) is expected


# -- what can be read but not counted --------------------------------------------------------------


@pytest.fixture
def _deep(monkeypatch):
    """Have every payload nested so deeply that it is decoded but not counted.

    At which depth one really is, depends on how deep the stack is already.
    """

    def recursion(_fields):
        raise RecursionError

    monkeypatch.setattr(message_module, "json", SimpleNamespace(loads=json.loads, dumps=recursion))


@pytest.mark.usefixtures("_deep")
def test_what_cannot_be_counted_is_given_up_and_not_run_for_ever():
    message = Message("task", [1], {})
    for settlement in (
        outcome.died(PAYLOAD, 3, "its worker died", "me"),
        outcome.unknown(PAYLOAD, message, 3, "me"),
        outcome.failed(PAYLOAD, message, policy(), ValueError(), "me"),
    ):
        letter = letter_of(settlement)
        assert (letter.reason, letter.payload) == ("not a message", PAYLOAD)

    assert outcome.rescued(PAYLOAD) == PAYLOAD


# -- dead letters ----------------------------------------------------------------------------------


def test_of_a_long_traceback_the_end_is_kept():
    letter = DeadLetter.decode(DeadLetter(b"a", "raised", "x" * 20_000 + "the end", "me").encode())

    assert len(letter.traceback) == 8_000
    assert letter.traceback.endswith("the end")
    assert letter.at.endswith("+00:00")


@pytest.mark.parametrize("letter", [b"", b"[]", b"{}", b'{"payload": 3}', b"\xff"])
def test_what_is_no_letter_says_so_and_is_kept(letter):
    found = DeadLetter.decode(letter)

    assert (found.reason, found.payload) == ("not a dead letter", letter)
