"""Turns: the one protocol by which claimed payloads change.

What a supervisor has claimed, and what it asks next.

A turn is one numbered exchange with Redis. It settles what is finished and claims what is wanted.
The server keeps for each supervisor the number of its last turn, a token that it answered with, and
what it gave:

================================  =============================================================
the server has                    then
================================  =============================================================
the number before, with the       execute: settle, claim, remember, answer with the claims and
turn's token                      the new token
this number                       executed before, and its answer was lost: execute nothing,
                                  answer again
nothing, or anything else         evicted: the supervisor was declared dead, or Redis lost its
                                  last writes
================================  =============================================================

So after any error the same turn is sent again, to the byte, until it is answered. An evicted
supervisor registers under a new id, whose first turn adopts what its workers still hold.

A claim is known by its number, never by its bytes. Its states, and who moves it:

=========  =============================================  ========================================
state      it is in                                       moved on by
=========  =============================================  ========================================
waiting    the queue, or its head                         a turn that claims: `InFlight.answered`
in flight  the in-flight hash, and `InFlight.claims`      `acknowledge` or `settle`
settled    the same, and `done` or `settlements`          a turn that settles: `answered`
refused    the same, and `refused`: a key of wrong type   `retry_refused`, back to settled
gone       none; its number is 0                          nobody
=========  =============================================  ========================================

Used by the dispatcher, and by a worker whose supervisor died. Not for deciding what becomes of a
claim.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

from wakaq.queue import Queue
from wakaq.store.broker import Broker
from wakaq.store.connection import RedisError, backoff, is_outage, pack_script
from wakaq.store.keys import SlotGroup
from wakaq.store.registry import new_supervisor_id
from wakaq.store.settlement import REQUEUE, Action, Settlement

logger = logging.getLogger("wakaq.store")

REFUSALS = 3  # of one kind in a row, after which nothing is repeated any more
KEYS_OF_A_QUEUE = 6  # in turn.lua
TO_FRONT = {Action.REQUEUE, Action.REDELIVER}


class Refused(Exception):
    """Redis refuses to register a supervisor, for a reason that does not heal."""


@dataclass(slots=True, eq=False)
class Claim:
    """A payload that this process has to settle."""

    queue: Queue | None  # None: a broadcast, which no hash holds
    payload: bytes
    number: int = 0  # under which the in-flight hash has it; 0: it does not


@dataclass(frozen=True)
class TurnAnswer:
    """What the server said to a turn."""

    token: str
    claims: list[Claim]
    failed: set[int]  # the places of settlements that could not be made; acks come after them
    errors: list[str]


@dataclass(frozen=True)
class Turn:
    """Settlements and a demand, ready to be sent any number of times."""

    keys: Sequence[str]
    args: Sequence[object]
    command: bytes  # the same, packed before it is urgent
    queues: Sequence[Queue]  # by their place in the keys
    done: int  # how many of the acks that wait it carries
    settled: Sequence[tuple[Claim, Settlement]]  # the others, each an operation, in their order
    wanted: int

    def send(self, broker: Broker) -> TurnAnswer | None:
        """Return the answer; None if evicted."""
        reply: bytes | None = broker.run_packed("turn", self.command)
        return None if reply is None else self._read(reply)

    def _read(self, reply: bytes) -> TurnAnswer:
        head = reply.index(b"\n")
        numbers = map(int, reply[:head].split())
        token, position = str(next(numbers)), head + 1
        failed = list(islice(numbers, next(numbers)))
        claims: list[Claim] = []
        errors: list[str] = []
        for place in numbers:
            first, how_many = next(numbers), next(numbers)
            for number, length in enumerate(islice(numbers, how_many), first):
                text = reply[position : position + length]
                position += length
                if place >= 0:
                    claims.append(Claim(self.queues[place], text, number))
                else:
                    errors.append(text.decode(errors="replace"))
        return TurnAnswer(token, claims, {index - 1 for index in failed}, errors)


@dataclass(frozen=True)
class AdoptAnswer:
    """What the server said to the first turn of a new id."""

    token: str
    found: dict[int, bytes]  # new number -> payload


@dataclass(frozen=True)
class Adopt:
    """The first turn of a new id, which takes over what its process holds of the old one."""

    keys: Sequence[str]
    args: Sequence[object]
    claims: Sequence[Claim]  # the new number of each is `base` and its place here
    base: int

    def send(self, broker: Broker) -> AdoptAnswer | None:
        """Return the answer; None if evicted."""
        reply: list[Any] | None = broker.run_script("adopt", self.keys, self.args)
        if reply is None:
            return None
        token, *found = reply
        pairs = zip(map(int, found[::2]), found[1::2], strict=True)
        return AdoptAnswer(token.decode(), dict(pairs))


@dataclass(frozen=True)
class Leave:
    """The last turn."""

    keys: Sequence[str]
    args: Sequence[object]

    def send(self, broker: Broker) -> bool:
        """Return whether the supervisor is off the registry; False if something is in flight."""
        reply: int | bytes | None = broker.run_script("leave", self.keys, self.args)
        if isinstance(reply, bytes):
            error = reply.decode(errors="replace")
            logger.warning("Others will have to forget this supervisor: %s", error)
        # Evicted has left, too: whoever declared it dead takes care of the rest.
        return reply != 0


@dataclass(frozen=True)
class Registered:
    """The id that a process has from now on, and the token for its first turn."""

    supervisor_id: str
    token: str


@dataclass(frozen=True)
class Registration:
    """Announces a process in a slot group.

    Each attempt is a new id, so that a late one changes nothing.
    """

    group: SlotGroup
    make_entry: Callable[[str], dict[str, Any]]  # of an id
    kind: str = ""  # of process, for people to see in the id

    def send(self, broker: Broker) -> Registered | None:
        """Return the id; None if it was taken."""
        supervisor_id = new_supervisor_id(self.kind)
        token = broker.register(self.group, supervisor_id, self.make_entry(supervisor_id))
        return None if token is None else Registered(supervisor_id, token)

    def describe_refusal(self, error: RedisError) -> str:
        """Say in one line that Redis refuses it."""
        names = f"{self.group.registry} and {self.group.turns}"
        return f"Redis refuses to register this supervisor in {names}: {error}"


Request = Turn | Adopt | Leave | Registration
Answer = TurnAnswer | AdoptAnswer | bool | Registered | None  # None: evicted


def exchange(
    request: Request,
    broker: Broker,
    pause: Callable[[float], bool],
    note_outage: Callable[[Exception], None],
) -> Answer:
    """Send a request until it is answered; return the answer.

    Args:
        request: What is to be sent, the same bytes each time.
        broker: Where to.
        pause: Waits so many seconds; returns whether to give up, and so to answer None.
        note_outage: Told of each error that is an outage.

    Raises:
        Refused: Redis refused a registration several times, and for a reason that does not heal.
    """
    refusal, refusals = "", 0
    for failures in count():
        try:
            return request.send(broker)
        except RedisError as error:
            if is_outage(error):
                note_outage(error)
                refusals = 0
            else:
                refusals = refusals + 1 if str(error) == refusal else 1
                refusal = str(error)
                broker.report_refusal(refusal)
                if refusals == REFUSALS and isinstance(request, Registration):
                    raise Refused(request.describe_refusal(error)) from error
                if refusals == REFUSALS:
                    return None
        if pause(backoff(failures)):
            return None
    raise AssertionError  # `count` does not end


class InFlight:
    """What one process has claimed from one slot group, and its next turn. For one thread."""

    def __init__(self, broker: Broker, group: SlotGroup) -> None:
        self._broker = broker
        self._group = group
        self._places = {queue: place for place, queue in enumerate(group.queues)}
        self.supervisor_id = ""
        self._former_id = ""
        self._number = 0  # of the last turn that was answered
        self._token = ""  # which it was answered with
        self._next_claim = 1  # the number of the next claim; it never goes back, whatever the id
        self.claims: dict[int, Claim] = {}
        self.done: list[Claim] = []
        self.settlements: list[tuple[Claim, Settlement]] = []
        self.refused: list[tuple[Claim, Settlement]] = []

    @property
    def turn_number(self) -> int:
        """The number of the last turn that was answered: this process's heartbeat."""
        return self._number

    @property
    def former_id(self) -> str:
        """The id from which this process is about to adopt; empty if there is none."""
        return self._former_id

    @property
    def is_settled(self) -> bool:
        """Whether nothing is in flight."""
        return not self.claims

    # -- settling and claiming ---------------------------------------------------------------------

    @property
    def to_settle(self) -> int:
        """How many settlements wait for the next turn."""
        return len(self.done) + len(self.settlements)

    def acknowledge(self, claims: Iterable[Claim]) -> None:
        """Have the next turn forget what is done."""
        self.done += [claim for claim in claims if claim.number]

    def settle(self, claim: Claim, settlement: Settlement) -> None:
        """Have the next turn make a decision true."""
        if settlement.action is Action.ACK:
            self.acknowledge([claim])
        elif claim.number:
            self.settlements.append((claim, settlement))

    def turn(self, wanted: int) -> Turn:
        """Return the next turn. It may be made again, with more, until it is sent."""
        args: list[object] = [
            self.supervisor_id, self._number + 1, self._token, wanted, self._next_claim,
        ]  # fmt: skip
        settled = sorted(self.settlements, key=_front_first)
        for claim, settlement in settled:
            assert claim.queue is not None
            args += (settlement.action.value, self._places[claim.queue], claim.number)
            args += self._details(settlement)
        numbers: dict[Queue | None, list[int]] = defaultdict(list)
        for claim in self.done:
            numbers[claim.queue].append(claim.number)
        for queue, of_queue in numbers.items():
            assert queue is not None
            ranges = _ranges(of_queue)
            args += ("ack", self._places[queue], len(ranges) // 2, *ranges)
        queues = self._group.queues
        keys = self._turn_keys()
        command = pack_script("turn", keys, args)
        return Turn(keys, args, command, queues, len(self.done), settled, wanted)

    def _details(self, settlement: Settlement) -> tuple[object, ...]:
        match settlement.action:
            case Action.REQUEUE:
                return ()
            case Action.DELAY:
                return (settlement.payload, settlement.delay)
            case Action.DEAD:
                return (settlement.payload, self._broker.settings.dead_letters)
            case _:
                return (settlement.payload,)

    def _turn_keys(self) -> list[str]:
        keys = [self._group.turns]
        for queue in self._group.queues:
            of = self._broker.keys.of(queue)
            keys += (of.queue, of.head, of.inflight + self.supervisor_id, of.eta, of.dead, of.stats)
        return keys

    def answered(self, turn: Turn, answer: TurnAnswer) -> list[Claim]:
        """Take note that a turn was answered; return what it claimed."""
        self._number += 1
        self._token = answer.token
        for place, (claim, settlement) in enumerate(turn.settled):
            if place in answer.failed:
                self.refused.append((claim, settlement))
            else:
                self._forget(claim)
        del self.settlements[: len(turn.settled)]
        for claim in self.done[: turn.done]:
            self._forget(claim)
        del self.done[: turn.done]
        for error in answer.errors:
            self._broker.report_refusal(error)
        for claim in answer.claims:
            self.claims[claim.number] = claim
        self._next_claim += turn.wanted
        return answer.claims

    def _forget(self, claim: Claim) -> None:
        del self.claims[claim.number]
        claim.number = 0

    def retry_refused(self) -> None:
        """Have the next turn try again what Redis refused."""
        self.settlements += self.refused
        self.refused = []

    # -- ids ---------------------------------------------------------------------------------------

    def begin(self, registered: Registered) -> None:
        """Go on under another id."""
        # What was to be adopted and was not, is still where it was, as far as anybody knows.
        self._former_id = self._former_id or self.supervisor_id
        self.supervisor_id, self._token = registered.supervisor_id, registered.token
        self._number = 0

    def adopts_from(self, supervisor_id: str, claims: Iterable[Claim]) -> None:
        """Hold what a supervisor that died had claimed for this worker, and so adopt it."""
        self._former_id = supervisor_id
        for claim in claims:
            self.claims[claim.number] = claim
            self._next_claim = max(self._next_claim, claim.number + 1)

    def adopt(self, *, takes_rest: bool) -> Adopt | None:
        """Return the first turn of this id; None if there was no id before.

        Args:
            takes_rest: Whether this process was the only one to use the old id, so that what is
                left there is nobody's.
        """
        if not self._former_id:
            return None
        claims: list[Claim] = []
        numbers: list[object] = []
        keys = [self._group.turns, self._group.registry]
        by_queue: dict[Queue | None, list[Claim]] = defaultdict(list)
        for claim in sorted(self.claims.values(), key=lambda claim: claim.number):
            by_queue[claim.queue].append(claim)
        for queue in self._group.queues:
            of = self._broker.keys.of(queue)
            keys += (of.inflight + self._former_id, of.inflight + self.supervisor_id, of.queue)
            own = by_queue[queue]
            claims += own
            numbers += (len(own), *(claim.number for claim in own))
        head = (self.supervisor_id, self._number + 1, self._token, self._former_id)
        args = (*head, self._next_claim, int(takes_rest), *numbers)
        return Adopt(keys, args, claims, self._next_claim)

    def adopted(self, adopt: Adopt, answer: AdoptAnswer) -> None:
        """Take note of what is ours under the new id.

        What was not found is settled, or somebody else's.
        """
        self._number += 1
        self._token = answer.token
        self._former_id = ""
        self._next_claim = adopt.base + len(adopt.claims)
        self.claims = {}
        for number, claim in enumerate(adopt.claims, adopt.base):
            payload = answer.found.get(number)
            claim.number = number if payload == claim.payload else 0
            if claim.number:
                self.claims[number] = claim
            elif payload is not None:
                # After a failover that forgot some turns an old number can mean another call, which
                # nobody runs.
                other = self.claims[number] = Claim(claim.queue, payload, number)
                self.settlements.append((other, REQUEUE))
        self.done = [claim for claim in self.done if claim.number]
        self.settlements = [pair for pair in self.settlements if pair[0].number]
        self.refused = [pair for pair in self.refused if pair[0].number]

    def leave(self) -> Leave:
        """Return the last turn."""
        keys = [self._group.turns, self._group.registry]
        for queue in self._group.queues:
            of = self._broker.keys.of(queue)
            keys += (of.inflight + self.supervisor_id, of.head, of.queue)
        return Leave(keys, (self.supervisor_id, self._number + 1, self._token))


def _front_first(pair: tuple[Claim, Settlement]) -> int:
    """Sort what goes to the front before the rest, the lowest number last, to be foremost."""
    claim, settlement = pair
    return -claim.number if settlement.action in TO_FRONT else 0


def _ranges(numbers: Iterable[int]) -> list[int]:
    """Return first and last number of each run without a gap."""
    found: list[int] = []
    for number in sorted(numbers):
        if found and number == found[-1] + 1:
            found[-1] = number
        else:
            found += (number, number)
    return found
