"""A message: one enqueued call of a task, and its wire form, the payload.

Not for where it goes: that is for `store.broker`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from wakaq.errors import NotAMessage
from wakaq.queue import Queue
from wakaq.serializer import dumps, loads

MOST_DESCRIBED = 200  # characters of a call, for people
_START = b'{"name": "'


@dataclass(slots=True)
class Message:
    """One enqueued call of a task."""

    name: str
    args: list[Any]
    kwargs: dict[str, Any]
    retry: int = 0  # how often it was tried again after a failure
    # How often its worker died while it ran, or its supervisor or machine while it was in flight.
    redelivered: int = 0
    unknown: int = 0  # how often it was put off, as its task was not known

    def encode(self) -> bytes:
        """Return the payload; raise as `Task.delay` does for what cannot be sent."""
        payload = encode_call(dumps(self.name), self.args, self.kwargs)
        counts = {"retry": self.retry, "redelivered": self.redelivered, "unknown": self.unknown}
        return recount(payload, **counts) if any(counts.values()) else payload

    @classmethod
    def decode(cls, payload: bytes) -> "Message":
        """Read a payload, but for keys that a sibling may have added.

        Raises:
            NotAMessage: It is none, with the reason.
        """
        try:
            fields = loads(payload)
        except ValueError as error:
            raise NotAMessage(f"not JSON: {error}") from error
        if type(fields) is not dict:
            raise NotAMessage(f"not an object but {fields!r:.200}")
        name, args, kwargs = fields.get("name"), fields.get("args", []), fields.get("kwargs", {})
        retry, redelivered = fields.get("retry", 0), fields.get("redelivered", 0)
        unknown = fields.get("unknown", 0)
        if type(name) is not str or type(args) is not list or type(kwargs) is not dict:
            found = f"the name is {name!r:.60}, args is {args!r:.60}, kwargs is {kwargs!r:.60}"
            raise NotAMessage(f"{found}: not a string, a list and an object")
        for count in (retry, redelivered, unknown):
            if type(count) is not int or count < 0:
                found = f"retry={retry!r:.60}, redelivered={redelivered!r:.60}"
                raise NotAMessage(f"{found}, unknown={unknown!r:.60}: not counts")
        return cls(name, args, kwargs, retry, redelivered, unknown)


def encode_call(json_name: bytes, args: Sequence[Any], kwargs: dict[str, Any]) -> bytes:
    """Return the payload of a call of the task whose name is given as JSON.

    Every `.delay()` comes through here, so what is mostly empty is not encoded.
    """
    json_args = dumps(args, "args") if args else b"[]"
    json_kwargs = dumps(kwargs, "kwargs") if kwargs else b"{}"
    return b'{"name": %b, "args": %b, "kwargs": %b}' % (json_name, json_args, json_kwargs)


def recount(payload: bytes, **counts: int) -> bytes:
    """Return the payload with other counts, such as `retry`, and all else as it arrived.

    Unlike decoding and encoding, it neither sees what the task did to its arguments nor drops a
    sibling's keys.

    Raises:
        NotAMessage: It is nested too deeply, but could be decoded, which takes a little less.
    """
    try:
        fields = json.loads(payload)
        for name, count in counts.items():
            fields.pop(name, None)
            if count:
                fields[name] = count
        return json.dumps(fields).encode()
    except RecursionError:
        raise NotAMessage("nested too deeply to be counted") from None


def name_of(payload: bytes) -> str | None:
    """Return the name of the task that a payload calls, None if it is no message.

    Of payloads as WakaQ and its siblings write them, however long, only the start is read.
    """
    if payload.startswith(_START):
        name = payload[len(_START) : payload.find(b'"', len(_START))]
        if b"\\" not in name:
            return name.decode(errors="replace")
    try:
        return Message.decode(payload).name
    except NotAMessage:
        return None


def describe(payload: bytes) -> str:
    """Return a payload as a call, for people; of a long one the start."""
    try:
        message = Message.decode(payload)
        arguments = [repr(value) for value in message.args]
        arguments += [f"{name}={value!r}" for name, value in message.kwargs.items()]
    except (NotAMessage, RecursionError):  # where it is nested too deeply to be shown
        return repr(payload[:MOST_DESCRIBED])
    call = f"{message.name}({', '.join(arguments)})"
    return call if len(call) <= MOST_DESCRIBED else f"{call[: MOST_DESCRIBED - 1]}…"


class Call(NamedTuple):
    """A payload with where it goes and when."""

    queue: Queue
    payload: bytes
    delay: float | None = None  # seconds from now
    at: float | None = None  # unix time
