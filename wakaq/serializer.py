"""Turns values into bytes and back: JSON, and tagged objects for what JSON lacks. Not for what a message consists of.

The format is shared with WakaQ 1 to 4 and with its TypeScript sibling: it cannot be changed.
"""

import base64
import json
import math
from collections.abc import Callable, Iterable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

_SCALARS = frozenset(
    {str, int, float, bool, type(None), Decimal, datetime, date, timedelta, bytes},
)
_ACCEPTED = "str, int, float, bool, None, list, tuple, set, dict, Decimal, datetime, date, timedelta or bytes"
_STR = frozenset({str})
_DATETIME_FIELDS = ("year", "month", "day", "hour", "minute", "second", "microsecond", "fold")


def dumps(value: object) -> bytes:
    """Encode a value.

    Raises:
        TypeError: Part of it has a type that cannot be sent, or a dict a key that would not come back as it is.
        ValueError: Part of it is NaN, infinite, nested in itself or too large. Both name the part.
    """
    try:
        # The encoder turns the keys 1, None and True into strings without a word, so it cannot be left to find them.
        if not _is_plain((value,)):
            _refuse(value, "")
        return _encode(value).encode()
    except (TypeError, ValueError):
        # Only now is it worth the time to find out where the culprit is.
        _refuse(value, "")
        raise
    except RecursionError:
        raise ValueError("arguments contain themselves or are nested too deeply") from None
    except OverflowError as error:
        raise ValueError(f"a datetime cannot be expressed in UTC: {error}") from error


def loads(data: bytes) -> Any:
    """Decode what `dumps`, or a sibling, encoded.

    Raises:
        ValueError: It is not JSON in UTF-8, or a tagged object is malformed.
    """
    try:
        # Plain JSON needs no call per object, which would double the time.
        return (_decode_tagged if b"__class__" in data else _decode)(data.decode())
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _is_plain(values: Iterable[Any]) -> bool:
    """Tell quickly that nothing in there needs a closer look: exact types, string keys, no tags."""
    for value in values:
        kind = type(value)
        if kind in _SCALARS:
            continue
        if kind is dict:
            if not _STR.issuperset(map(type, value)) or "__class__" in value:
                return False
            value = value.values()  # noqa: PLW2901 - saves a branch in a hot loop
        elif kind is not list and kind is not tuple:
            return False
        if not _is_plain(value):
            return False
    return True


def _refuse(value: Any, path: str) -> None:
    """Raise for the first part that cannot be sent, or not without becoming something else."""
    where = path or "the value"
    if isinstance(value, dict):
        _refuse_keys(value, where)
        for key, item in value.items():
            _refuse(item, f"{path}[{json.dumps(key)}]" if path else key)
    elif isinstance(value, list | tuple | set | frozenset):
        for index, item in enumerate(value):
            _refuse(item, f"{path}[{index}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(
                f"{where} is {value}, which JSON cannot express: send None or a string"
            )
    elif not isinstance(value, str | int | Decimal | date | timedelta | bytes | None):
        raise TypeError(f"{where} is a {type(value).__qualname__}: send {_ACCEPTED}")


def _refuse_keys(value: dict[Any, Any], where: str) -> None:
    for key, item in value.items():
        if not isinstance(key, str):
            raise TypeError(
                f"{where} has the key {key!r}, which would arrive as a string: send str({key!r})"
            )
        if key == "__class__" and isinstance(item, str) and item in _REVIVERS:
            raise TypeError(
                f'{where} has the key "__class__": "{item}", which is reserved: rename it'
            )


def _tag(value: Any) -> object:
    """Express for the encoder what JSON has no type for."""
    if isinstance(value, Decimal):
        return {"__class__": "Decimal", "value": str(value)}
    if isinstance(value, datetime):  # before date, whose subclass it is
        if value.tzinfo is not None:
            value = value.astimezone(UTC)
        return {
            "__class__": "datetime",
            **{name: getattr(value, name) for name in _DATETIME_FIELDS},
        }
    if isinstance(value, date):
        return {"__class__": "date", "year": value.year, "month": value.month, "day": value.day}
    if isinstance(value, timedelta):
        names = ("days", "seconds", "microseconds")
        return {"__class__": "timedelta", "kwargs": {name: getattr(value, name) for name in names}}
    if isinstance(value, bytes):
        return {"__class__": "bytes", "value": base64.b64encode(value).decode()}
    return list(value)  # a set: _refuse let nothing else pass


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
_encode = json.JSONEncoder(allow_nan=False, check_circular=False, default=_tag).encode
_decode = json.JSONDecoder().decode
_decode_tagged = json.JSONDecoder(object_hook=_revive).decode
