"""What a dispatcher asks of Redis in one turn: settlements of what was claimed, then new claims.

Builds the arguments of `lua/turn.lua` and reads its reply; not for talking to Redis, which is `broker`'s part.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
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

    `done`, `first` and `requeue` take any number of payloads; the others take one, and what replaces it. Without a lane it
    is about a broadcast, which the dispatcher settles by itself.
    """

    lane: Lane | None
    action: str
    payloads: Sequence[bytes]
    new: bytes = b""
    delay: float = 0.0


def grouped(action: str, claims: Iterable[Claim]) -> list[Settlement]:
    """Settle claims in one way; neighbours in one lane together."""
    lanes = groupby(claims, key=itemgetter(0))
    return [Settlement(lane, action, [claim.payload for claim in group]) for lane, group in lanes]


class Turn:
    """The keys and arguments of one call of the script."""

    def __init__(self, keys: Keys, worker_id: str, expected: int | None, number: int) -> None:
        self._spell = keys
        self._index: dict[str, int] = {keys.turns: 1}
        self._lanes: dict[int, Lane] = {}
        self.args: list[str | bytes | int | float] = [
            worker_id,
            "" if expected is None else expected,
            number,
        ]

    @property
    def keys(self) -> list[str]:
        return list(self._index)

    def _key(self, key: str) -> int:
        return self._index.setdefault(key, len(self._index) + 1)

    def settle(self, settlement: Settlement, letters_kept: int) -> None:
        lane, action, payloads, new, delay = settlement
        assert lane is not None
        spell = self._spell.of(lane.queue)
        self.args += (action, self._key(lane.key))
        if action == "first":
            self.args += (self._key(spell.stats), len(payloads), payloads[-1])
        elif action == "done":
            self.args += (self._key(spell.stats), len(payloads), *payloads)
        elif action == "requeue":
            self.args += (self._key(spell.queue), len(payloads), *payloads)
        else:
            target = {"delay": spell.eta, "dead": spell.dead}.get(action, spell.queue)
            self.args += (self._key(target), self._key(spell.stats), payloads[0], new)
            if action == "delay":
                self.args.append(delay)
            elif action == "dead":
                self.args.append(letters_kept)

    def claim(self, want: int, lanes: Sequence[Lane]) -> None:
        """Claim up to `want` payloads into the lanes, from their queues in the order given."""
        self.args += ("claim", len(lanes), want)
        for lane in lanes:
            index = self._key(lane.key)
            self._lanes[index] = lane
            self.args += (self._key(self._spell.of(lane.queue).queue), index)

    def read(self, reply: bytes) -> tuple[list[Claim], list[str]]:
        """Return what was claimed, and which keys could not be used, in the server's words."""
        head = reply.index(b"\n")
        numbers, position = map(int, reply[:head].split()), head + 1
        claims: list[Claim] = []
        errors: list[str] = []
        for index in numbers:
            for length in islice(numbers, next(numbers)):
                payload = reply[position : position + length]
                position += length
                if index:
                    claims.append(Claim(self._lanes[index], payload))
                else:
                    errors.append(payload.decode(errors="replace"))
        return claims, errors
