"""Turns values into bytes and back: JSON, and tagged objects for what JSON lacks.

The format is shared with WakaQ 1 to 4 and with its TypeScript sibling: it cannot be changed. Not
for what a message consists of.
"""

import base64
import json
import math
from collections.abc import Callable, Collection, Iterable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

Path = tuple[Any, ...]  # the keys and indexes that lead to a value

_SCALARS = (str, int, float, bool, type(None), Decimal, datetime, date, timedelta, bytes)
_LISTS = (list, tuple, set, frozenset)
_ACCEPTED = (
    "str, int, float, bool, None, list, tuple, set, dict,"
    " Decimal, datetime, date, timedelta or bytes"
)
_DATETIME_FIELDS = ("year", "month", "day", "hour", "minute", "second", "microsecond", "fold")


def dumps(value: object, *path: str) -> bytes:
    """Encode a value.

    Args:
        value: What to encode.
        *path: What errors call it.

    Raises:
        TypeError: A part of it has a type, or a key, that cannot be sent.
        ValueError: A part is NaN, infinite or not expressible in UTC, or contains itself.
    """
    try:
        # The encoder turns the keys 1, None and True into strings without a word, so it cannot be
        # left to find them.
        _check(value, path, skip=_SCALARS)
        return _ENCODER.encode(value).encode()
    except ValueError:
        # Only now is it worth the time to look at each number: this names the one that is NaN.
        _check(value, path, skip=())
        raise
    except RecursionError:
        raise ValueError("arguments contain themselves or are nested too deeply") from None
    except OverflowError as error:
        raise ValueError(f"a datetime cannot be expressed in UTC: {error}") from error


def loads(data: bytes) -> Any:
    """Decode what `dumps`, or a sibling, encoded; raise ValueError for anything else."""
    # Plain JSON needs no call for each object, which would double the time.
    decoder = _TAGGED_DECODER if b"__class__" in data else _PLAIN_DECODER
    text = data.strip().decode()
    try:
        value, end = decoder.raw_decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if end < len(text):
        raise ValueError(f"something follows at character {end}")
    return value


def _check(value: Any, path: Path, skip: Collection[type]) -> None:
    """Raise for the first part that cannot be sent, or not without becoming something else.

    Parts whose type is to be skipped are not looked at.
    """
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, _LISTS):
        parts = enumerate(value)
    elif isinstance(value, dict):
        _check_keys(value, path)
        parts = value.items()
    elif not isinstance(value, _SCALARS):
        raise TypeError(f"{_spell(path)} is a {type(value).__qualname__}: send {_ACCEPTED}")
    elif isinstance(value, float) and not math.isfinite(value):
        remedy = "which JSON cannot express: send None or a string"
        raise ValueError(f"{_spell(path)} is {value}, {remedy}")
    for key, part in parts:
        if type(part) not in skip:
            _check(part, (*path, key), skip)


def _check_keys(value: dict[Any, Any], path: Path) -> None:
    for key in value:
        if not isinstance(key, str):
            remedy = f"which would arrive as a string: send str({key!r})"
            raise TypeError(f"{_spell(path)} has the key {key!r}, {remedy}")
    tag = value.get("__class__")
    if isinstance(tag, str) and tag in _REVIVERS:
        what = f'has the key "__class__": "{tag}", which is reserved: rename it'
        raise TypeError(f"{_spell(path)} {what}")


def _spell(path: Path) -> str:
    """Return a path as Python would write it, such as `args[1]["price"]`."""
    first, *rest = path or ("the value",)
    return str(first) + "".join(f"[{json.dumps(key)}]" for key in rest)


def _tag(value: Any) -> object:
    """Express for the encoder what JSON has no type for."""
    if isinstance(value, Decimal):
        return {"__class__": "Decimal", "value": str(value)}
    if isinstance(value, bytes):
        return {"__class__": "bytes", "value": base64.b64encode(value).decode()}
    if isinstance(value, timedelta):
        names = ("days", "seconds", "microseconds")
        return {"__class__": "timedelta", "kwargs": {name: getattr(value, name) for name in names}}
    if isinstance(value, datetime):  # before date, whose subclass it is
        value = value if value.tzinfo is None else value.astimezone(UTC)
        return {"__class__": "datetime"} | {one: getattr(value, one) for one in _DATETIME_FIELDS}
    if isinstance(value, date):
        return {"__class__": "date", "year": value.year, "month": value.month, "day": value.day}
    return list(value)  # a set: _check let nothing else pass


def _datetime(tagged: dict[str, Any]) -> datetime:
    year, month, day, *time, fold = (tagged.get(name, 0) for name in _DATETIME_FIELDS)
    return datetime(year, month, day, *time, fold=fold)  # noqa: DTZ001 - naive UTC is the format


_REVIVERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "Decimal": lambda tagged: Decimal(tagged["value"]),
    "datetime": _datetime,
    "date": lambda tagged: date(tagged["year"], tagged["month"], tagged["day"]),
    "timedelta": lambda tagged: timedelta(**tagged["kwargs"]),
    "bytes": lambda tagged: base64.b64decode(tagged["value"], validate=True),
}


def _revive(tagged: dict[str, Any]) -> object:
    name = tagged.get("__class__")
    if not isinstance(name, str) or name not in _REVIVERS:
        return tagged  # a user's own dict, or a sibling's newer tag
    try:
        return _REVIVERS[name](tagged)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"a malformed {name}: {tagged!r:.200}") from error


# Arguments that contain themselves end in a RecursionError, which costs nothing until it happens.
_ENCODER = json.JSONEncoder(allow_nan=False, check_circular=False, default=_tag)
_PLAIN_DECODER = json.JSONDecoder()
_TAGGED_DECODER = json.JSONDecoder(object_hook=_revive)
