"""What a dispatcher asks of Redis in one turn: settlements of what was claimed, then new claims.

Builds the arguments of `lua/turn.lua` and reads its reply; not for talking to Redis, which is `broker`'s part.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from wakaq.keys import Keys
from wakaq.queue import Queue


@dataclass(frozen=True, slots=True, eq=False)
class Lane:
    """One list of payloads in flight: those that one supervisor claimed from one queue for one of its children."""

    worker_id: str
    queue: Queue
    number: int
    key: str


class Claim(NamedTuple):
    """A payload in flight; without a lane it is a broadcast, which no list holds."""

    lane: Lane | None
    payload: bytes


class Settlement(NamedTuple):
    """What becomes of claimed payloads: the name of an operation of `lua/turn.lua` and its arguments.

    `done` and `requeue` take any number of payloads; the others take one, and what replaces it. Without a lane it is
    about a broadcast, which the dispatcher settles by itself.
    """

    lane: Lane | None
    action: str
    payloads: Sequence[bytes]
    new: bytes = b""
    delay: float = 0.0


class Turn:
    """The keys and arguments of one call of the script."""

    def __init__(self, keys: Keys, worker_id: str, expected: int | None, number: int) -> None:
        self._spell = keys
        self._index: dict[str, int] = {}
        self._lanes: dict[int, Lane] = {}
        self.keys: list[str] = []
        self.args: list[str | bytes | int | float] = [
            worker_id,
            "" if expected is None else expected,
            number,
        ]

    def _key(self, key: str) -> int:
        index = self._index.get(key)
        if index is None:
            self.keys.append(key)
            index = self._index[key] = len(self.keys)
        return index

    def fence(self) -> None:
        """Name the hash with the last turns; it has to be the first key."""
        self._key(self._spell.turns())

    def settle(self, settlement: Settlement, letters_kept: int) -> None:
        lane, action, payloads, new, delay = settlement
        assert lane is not None
        queue, spell = lane.queue, self._spell
        self.args += (action, self._key(lane.key))
        if action == "done":
            self.args += (self._key(spell.stats(queue)), len(payloads), *payloads)
        elif action == "requeue":
            self.args += (self._key(spell.queue(queue)), len(payloads), *payloads)
        else:
            target = {"delay": spell.eta, "dead": spell.dead}.get(action, spell.queue)(queue)
            self.args += (self._key(target), self._key(spell.stats(queue)), payloads[0], new)
            if action == "delay":
                self.args.append(delay)
            elif action == "dead":
                self.args.append(letters_kept)

    def claim(self, want: int, lanes: Iterable[Lane]) -> None:
        """Claim up to `want` payloads into the lanes, from their queues in the order given."""
        arguments: list[int] = []
        for lane in lanes:
            index = self._key(lane.key)
            self._lanes[index] = lane
            arguments += (self._key(self._spell.queue(lane.queue)), index)
        self.args += ("claim", len(arguments) // 2, want, *arguments)

    def read(self, reply: list[list[bytes]]) -> list[Claim]:
        return [Claim(self._lanes[int(lane)], p) for lane, *payloads in reply[2:] for p in payloads]

    def errors(self, reply: list[list[bytes]]) -> list[str]:
        """Return the keys that could not be used, with the server's words."""
        return [error.decode(errors="replace") for error in reply[1]]
