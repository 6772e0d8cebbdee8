"""Dead letters: what is kept of a payload that WakaQ gave up on. Not for deciding when: that is the worker's part."""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

RAISED = "raised"
SOFT_TIMEOUT = "soft timeout"
HARD_TIMEOUT = "hard timeout"
REDELIVERED = "redelivered too often"
UNKNOWN_TASK = "unknown task"
NOT_A_MESSAGE = "not a message"
_TAIL = 8_000  # characters of traceback


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter; `at` is the time by the clock of the machine that gave up, for people to read."""

    payload: bytes
    reason: str
    traceback: str
    worker: str
    at: str = ""

    def encode(self) -> bytes:
        return json.dumps(self.to_dict()).encode()

    def to_dict(self) -> dict[str, str]:
        """Return it as JSON can hold it."""
        return asdict(self) | {
            # Whatever was found in the queue is kept, to the byte.
            "payload": self.payload.decode(errors="surrogateescape"),
            "traceback": self.traceback[-_TAIL:],
            "at": self.at or datetime.now(UTC).isoformat(timespec="seconds"),
        }

    @classmethod
    def decode(cls, letter: bytes) -> "Letter":
        """Read a letter; what is none becomes one that says so, with all that was found as its payload."""
        try:
            fields = json.loads(letter)
            payload = fields["payload"].encode(errors="surrogateescape")
            rest = (str(fields.get(name, "")) for name in ("reason", "traceback", "worker", "at"))
            return cls(payload, *rest)
        except (ValueError, KeyError, TypeError, AttributeError):
            return cls(letter, "not a dead letter", "", "?", "?")
