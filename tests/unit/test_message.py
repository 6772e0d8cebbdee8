import pytest

from wakaq import NotAMessage
from wakaq.message import Message, describe, name_of, recount


def test_a_payload_begins_with_its_name_and_has_counts_only_above_0():
    assert Message("x", [1], {"a": 2}).encode() == b'{"name": "x", "args": [1], "kwargs": {"a": 2}}'
    assert (
        Message("x", [], {}, retry=2, redelivered=1).encode()
        == b'{"name": "x", "args": [], "kwargs": {}, "retry": 2, "redelivered": 1}'
    )


@pytest.mark.parametrize(
    "message", [Message("x", [1, [2]], {"a": b"b"}, 4, 5, 6), Message("", [], {})]
)
def test_a_message_comes_back(message):
    assert Message.decode(message.encode()) == message


def test_arguments_may_be_absent_and_unknown_keys_are_ignored():
    assert Message.decode(b'{"id": 7, "name": "x"}') == Message("x", [], {})


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"\xff", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "not an object"),
        (b"null", "not an object"),
        (b'{"__class__": "bytes", "value": ""}', "not an object"),
        (b"{}", "the name is None"),
        (b'{"name": 5}', "the name is 5"),
        (b'{"name": "x", "args": {}}', "args is {}"),
        (b'{"name": "x", "args": null}', "args is None"),
        (b'{"name": "x", "args": "ab"}', "args is 'ab'"),
        (b'{"name": "x", "kwargs": []}', "kwargs is"),
        (b'{"name": "x", "kwargs": {"__class__": "Decimal", "value": "1"}}', "kwargs is Decimal"),
        (b'{"name": "x", "args": [{"__class__": "Decimal"}]}', "malformed Decimal"),
        (b'{"name": "x", "retry": -1}', "retry=-1"),
        (b'{"name": "x", "retry": true}', "retry=True"),
        (b'{"name": "x", "redelivered": 1.5}', "redelivered=1.5"),
        (b'{"name": "x", "unknown": null}', "unknown=None"),
    ],
)
def test_what_is_no_message_says_why(payload, reason):
    with pytest.raises(NotAMessage, match=reason):
        Message.decode(payload)


def test_a_huge_payload_does_not_end_up_in_the_reason():
    with pytest.raises(NotAMessage) as caught:
        Message.decode(b'["' + b"x" * 100_000 + b'"]')

    assert len(str(caught.value)) < 300


def test_a_recount_changes_the_counts_and_nothing_else():
    payload = (
        b'{"id": 7, "name": "x", "args": [NaN, {"__class__": "Decimal", "value": "1.0"}],'
        b' "retry": 1}'
    )

    again = recount(payload, retry=2, redelivered=1)

    assert again == payload.replace(b'"retry": 1', b'"retry": 2, "redelivered": 1')
    assert recount(again, retry=1, redelivered=0) == payload


def test_the_same_counts_make_the_same_payload_as_encoding_does():
    message = Message("x", ["\u00e4"], {"a": 1}, retry=3, redelivered=2)

    assert (
        recount(Message("x", ["\u00e4"], {"a": 1}).encode(), retry=3, redelivered=2)
        == message.encode()
    )


@pytest.mark.parametrize(
    ("payload", "name"),
    [
        (b'{"name": "charge", "args": [1]}', "charge"),
        (b'{"args": [], "name": "charge"}', "charge"),
        (b'{"name":"charge"}', "charge"),
        (Message('a"b\u00e4', [], {}).encode(), 'a"b\u00e4'),
        (b"{}", None),
        (b"\xff", None),
    ],
)
def test_the_name_of_a_payload_is_known_without_reading_it_all(payload, name):
    assert name_of(payload) == name


def test_a_payload_is_described_as_a_call():
    assert describe(Message("charge", [1, "a"], {"cents": b"x"}).encode()) == (
        "charge(1, 'a', cents=b'x')"
    )
    assert describe(b"\xff") == "b'\\xff'"


def test_of_a_long_call_the_start_is_described():
    text = describe(Message("charge", ["x" * 100_000], {}).encode())

    assert text == f"charge('{'x' * 191}…"
    assert len(text) == 200
