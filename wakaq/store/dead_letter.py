"""Dead letters: what is kept of a payload that WakaQ gave up on.

Not for deciding when that is: `wakaq.worker.outcome` does.
"""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum

_TRACEBACK_TAIL = 8_000  # characters
_UNKNOWN = "?"


class Reason(StrEnum):
    """Why a payload became a dead letter, as the letter says it."""

    RAISED = "raised"
    SOFT_TIMEOUT = "soft timeout"
    HARD_TIMEOUT = "hard timeout"
    REDELIVERED = "redelivered too often"
    UNKNOWN_TASK = "unknown task"
    NOT_A_MESSAGE = "not a message"


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A payload that WakaQ gave up on, and why."""

    payload: bytes
    reason: str  # a Reason, or another text that was found in Redis
    traceback: str  # only its end is kept
    worker: str  # who gave up, for people to read
    at: str = ""  # ISO 8601, by that machine's clock, for people to read; empty: now

    def encode(self) -> bytes:
        """Return it as Redis keeps it."""
        return json.dumps(self.to_dict()).encode()

    def to_dict(self) -> dict[str, str]:
        """Return it as JSON can hold it."""
        return asdict(self) | {
            # A payload may be any bytes; as surrogates all of them survive the JSON.
            "payload": self.payload.decode(errors="surrogateescape"),
            "traceback": self.traceback[-_TRACEBACK_TAIL:],
            "at": self.at or datetime.now(UTC).isoformat(timespec="seconds"),
        }

    @classmethod
    def decode(cls, raw: bytes) -> "DeadLetter":
        """Read a dead letter.

        What is no dead letter becomes one that says so, with all that was found as its payload.
        """
        try:
            fields = json.loads(raw)
            payload = fields["payload"].encode(errors="surrogateescape")
            rest = (str(fields.get(name, "")) for name in ("reason", "traceback", "worker", "at"))
            return cls(payload, *rest)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return cls(raw, "not a dead letter", "", _UNKNOWN, _UNKNOWN)
