# ruff: noqa: DTZ001 - naive datetimes are what the format has
"""The wire format is shared with other implementations.

So its bytes are tested, not only that what is sent comes back.
"""

import enum
import json
from collections import OrderedDict
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from uuid import UUID

import pytest

from wakaq.serializer import dumps, loads

EASTERN = timezone(timedelta(hours=-5))


class Color(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Name(enum.StrEnum):
    BOB = "bob"


@pytest.mark.parametrize(
    ("value", "wire"),
    [
        (Decimal("1.50"), '{"__class__": "Decimal", "value": "1.50"}'),
        (
            datetime(2026, 1, 2, 3, 4, 5, 6, fold=1),
            (
                '{"__class__": "datetime", "year": 2026, "month": 1, "day": 2, "hour": 3,'
                ' "minute": 4, "second": 5, "microsecond": 6, "fold": 1}'
            ),
        ),
        (date(2026, 1, 2), '{"__class__": "date", "year": 2026, "month": 1, "day": 2}'),
        (
            timedelta(days=-1, seconds=2, microseconds=3),
            '{"__class__": "timedelta", "kwargs": {"days": -1, "seconds": 2, "microseconds": 3}}',
        ),
        (b"\x00\xff", '{"__class__": "bytes", "value": "AP8="}'),
        ("\u00e4\ud800", '"\\u00e4\\ud800"'),
        ({"a": [1, 2.5, None, True]}, '{"a": [1, 2.5, null, true]}'),
        ({"__class__": "Fraction", "value": 1}, '{"__class__": "Fraction", "value": 1}'),
        ({"__class__": [1]}, '{"__class__": [1]}'),
        (10**30, str(10**30)),
    ],
)
def test_a_value_has_this_form_and_comes_back(value, wire):
    assert dumps(value).decode() == wire

    result = loads(wire.encode())

    assert result == value
    assert type(result) is type(value)
    assert getattr(result, "fold", 0) == getattr(value, "fold", 0)


@pytest.mark.parametrize(
    ("value", "arrives"),
    [
        (datetime(2026, 1, 1, 22, tzinfo=EASTERN), datetime(2026, 1, 2, 3)),
        (datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 1)),
        ((1, (2,)), [1, [2]]),
        ({3}, [3]),
        (frozenset({"x"}), ["x"]),
        ({"a": {(1, 2)}}, {"a": [[1, 2]]}),
        (OrderedDict(a=1), {"a": 1}),
        (Level.HIGH, 3),
        ([Name.BOB, {Name.BOB: 1}], ["bob", {"bob": 1}]),
    ],
)
def test_a_value_without_a_form_of_its_own_arrives_as_the_nearest(value, arrives):
    result = loads(dumps(value))

    assert result == arrives
    assert getattr(result, "tzinfo", None) is None


@pytest.mark.parametrize(
    ("value", "error", "names"),
    [
        ({"args": [1, {"price": object()}]}, TypeError, r'args\[1\]\["price"\] is a object'),
        ({"args": [UUID(int=0)]}, TypeError, r"args\[0\] is a UUID: send str, int"),
        ({"kwargs": {"color": Color.RED}}, TypeError, r'kwargs\["color"\] is a Color'),
        ({"args": [bytearray()]}, TypeError, r"args\[0\] is a bytearray"),
        ({"args": [[float("nan")]]}, ValueError, r"args\[0\]\[0\] is nan"),
        ({"kwargs": {"x": (float("-inf"),)}}, ValueError, r'kwargs\["x"\]\[0\] is -inf'),
        ({"args": [{1: "a"}]}, TypeError, r"args\[0\] has the key 1, .* send str\(1\)"),
        ({"args": [{None: 1}]}, TypeError, r"args\[0\] has the key None"),
        ({"args": [{"a": ({True: 1},)}]}, TypeError, r'args\[0\]\["a"\]\[0\] has the key True'),
        ({"args": [OrderedDict({1.5: 1})]}, TypeError, r"args\[0\] has the key 1.5"),
        ({"args": [{(1, 2): 1}]}, TypeError, r"args\[0\] has the key \(1, 2\)"),
        ({"args": [{"__class__": "Decimal"}]}, TypeError, r'args\[0\] has the key "__class__"'),
        ({"args": [datetime.min.replace(tzinfo=timezone.max)]}, ValueError, "UTC"),
        ({"args": [10**5000]}, ValueError, "integer"),
        (object(), TypeError, "the value is a object"),
    ],
)
def test_what_cannot_be_sent_is_refused_by_name(value, error, names):
    # Something tagged before it, so that the encoder has been busy.
    with pytest.raises(error, match=names):
        dumps(value)


def test_a_value_that_contains_itself_is_refused():
    endless = []
    endless.append(endless)

    with pytest.raises(ValueError, match="contain themselves"):
        dumps({"args": [endless]})


def test_a_tag_that_is_not_ours_stays_a_dict_among_ours():
    wire = (
        b'[{"__class__": "Later", "x": {"__class__": "bytes", "value": "AA=="}}, {"__class__": 1}]'
    )

    assert loads(wire) == [{"__class__": "Later", "x": b"\0"}, {"__class__": 1}]


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\xff",
        b"{",
        b"[1] 2",
        "\ufeff[]".encode(),
        b"[" * 100_000,
        b"1" * 5000,
        b'{"__class__": "Decimal"}',
        b'{"__class__": "Decimal", "value": "x"}',
        b'{"__class__": "Decimal", "value": {}}',
        b'{"__class__": "datetime"}',
        b'{"__class__": "datetime", "year": 2026, "month": 13, "day": 1}',
        b'{"__class__": "datetime", "year": 1' + b"0" * 20 + b', "month": 1, "day": 1}',
        b'{"__class__": "date", "year": "2026", "month": 1, "day": 1}',
        b'{"__class__": "timedelta", "kwargs": {"days": 1e30}}',
        b'{"__class__": "timedelta", "kwargs": {"years": 1}}',
        b'{"__class__": "timedelta", "kwargs": 1}',
        b'{"__class__": "bytes", "value": "?"}',
        b'{"__class__": "bytes", "value": null}',
    ],
)
def test_garbage_is_a_value_error(garbage):
    with pytest.raises(ValueError, match=r"."):
        loads(garbage)


def test_a_datetime_without_its_small_fields_is_read():
    wire = b'{"__class__": "datetime", "year": 2026, "month": 1, "day": 2}'

    assert loads(wire) == datetime(2026, 1, 2)


def test_plain_values_are_what_json_makes_of_them():
    value = {"name": "x", "args": [1, "a", {"b": [None, 1.5]}], "kwargs": {}}

    assert dumps(value) == json.dumps(value).encode()
