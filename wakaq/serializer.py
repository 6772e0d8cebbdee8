"""Turns values into bytes and back: JSON, and tagged objects for what JSON lacks. Not for what a message consists of.

The format is shared with WakaQ 1 to 4 and with its TypeScript sibling: it cannot be changed.
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
_ACCEPTED = "str, int, float, bool, None, list, tuple, set, dict, Decimal, datetime, date, timedelta or bytes"
_DATETIME_FIELDS = ("year", "month", "day", "hour", "minute", "second", "microsecond", "fold")


def dumps(value: object, *path: str) -> bytes:
    """Encode a value, which errors call by the path: TypeError or ValueError for a part that cannot be sent."""
    try:
        # The encoder turns the keys 1, None and True into strings without a word, so it cannot be left to find them.
        _check(value, path, _SCALARS)
        return "".join(_encode(value, 0)).encode()
    except ValueError:
        # Only now is it worth the time to look at each number.
        _check(value, path, ())
        raise
    except RecursionError:
        raise ValueError("arguments contain themselves or are nested too deeply") from None
    except OverflowError as error:
        raise ValueError(f"a datetime cannot be expressed in UTC: {error}") from error


def loads(data: bytes) -> Any:
    """Decode what `dumps`, or a sibling, encoded; raise ValueError for anything else."""
    # Plain JSON needs no call per object, which would double the time.
    decoder = _TAGGED if b"__class__" in data else _PLAIN
    text = data.decode()
    try:
        if text.startswith("{"):  # mostly: so it needs no search for white space at its ends
            value, end = decoder.raw_decode(text)
            if end == len(text):
                return value
        return decoder.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _check(value: Any, path: Path, fine: Collection[type]) -> None:
    """Raise for the first part that cannot be sent, or not without becoming something else; skip types that are fine."""
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
    for key, item in parts:
        if type(item) not in fine:
            _check(item, (*path, key), fine)


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


# Arguments that contain themselves end in a RecursionError: cheaper than remembering every container.
_ENCODER = json.JSONEncoder(allow_nan=False, check_circular=False, default=_tag)
# What its `encode` makes anew for each value, for which it takes longer than for a short value; None where Python has no C.
_make: Any = getattr(json.encoder, "c_make_encoder", None)
_encode: Callable[[object, int], Iterable[str]] = (
    _make(None, _tag, json.encoder.encode_basestring_ascii, None, ": ", ", ", *[False] * 3)
    if _make
    else lambda value, _: _ENCODER.iterencode(value)
)
_PLAIN, _TAGGED = json.JSONDecoder(), json.JSONDecoder(object_hook=_revive)
