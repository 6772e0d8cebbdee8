"""What this supervisor owes to Redis: settlements not yet confirmed, and the number of its last turn.

Dispatcher thread only. Not for deciding what becomes of a payload, but for making it true exactly once, whatever happens
to the connection. A call whose reply is lost may have been executed, may be executed later, or never. So each turn names
the one before it, and the server refuses it if that is not its last one: of the attempts at a turn at most one ever
happens, and the number found on the server afterwards tells which. What it claimed unseen is found in the lanes.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from wakaq.broker import Broker
from wakaq.client import backoff
from wakaq.queue import Queue
from wakaq.turn import Claim, Lane, Settlement, grouped

INTERVAL = 60.0  # seconds between comparisons with the server when nothing has gone wrong
HAUNTED = 600.0  # seconds in which a call that was cut off may still be executed
LOOK_EVERY = 15.0  # seconds between comparisons in that time


class Evicted(Exception):
    """The server does not know this supervisor: others declared it dead, or the data is gone."""


class Ledger:
    """Turns, and what is owed after a turn that failed."""

    def __init__(self, broker: Broker, served: Sequence[Queue]) -> None:
        self._broker = broker
        self._served = served
        self._pending: list[Settlement] = []
        self._failures = 0
        self._attempts: dict[int, int] = {}  # turn number -> how many settlements it carried
        self.rename("")
        # When to compare with the server; in doubt nothing else is asked of it before.
        self.compare_at = 0.0
        self.is_in_doubt = False
        self._haunted_until = 0.0
        # Whether a lane holds nothing but what its child has, in that order.
        self._is_pure = True

    def rename(self, worker_id: str) -> None:
        """Go on under a new id; what is pending names its lanes itself.

        What a lost attempt carried is left to the rescuers: repeated without its fence, it could take an equal payload.
        """
        del self._pending[: max(self._attempts.values(), default=0)]
        self.worker_id = worker_id
        self._last_turn = 0
        self._tried = 0
        self._attempts.clear()
        self._lanes: dict[int, list[Lane]] = {}

    @property
    def is_settled(self) -> bool:
        return not self._pending and not self.is_in_doubt

    def is_haunted(self, now: float) -> bool:
        """Whether something may yet be claimed for this supervisor by a watcher's call that was cut off."""
        return now < self._haunted_until

    def lanes(self, number: int) -> list[Lane]:
        """Return a child's lanes, in the order of the queues' priorities."""
        lanes = self._lanes.get(number)
        if lanes is None:
            lanes = [self._broker.lane(queue, self.worker_id, number) for queue in self._served]
            self._lanes[number] = lanes
        return lanes

    def add(self, settlements: Iterable[Settlement]) -> None:
        self._pending += [one for one in settlements if one.lane is not None]

    def ack(self, claims: Iterable[Claim], number: int | None) -> None:
        """Settle what was finished, by the child of that `number` if that runs one task after the other, else None.

        What such a child finishes is what its lane begins with, and is acked by its count: so payloads need not travel
        again. Not what a watcher claimed, which goes to any child, nor where Redis refused something that then stays in a lane.
        """
        carried = max(self._attempts.values(), default=0)  # by turns that may have happened
        for one in grouped("done", claims):
            lane = one.lane
            is_own = lane and (lane.number, lane.worker_id) == (number, self.worker_id)
            if not (is_own and self._is_pure):
                self.add([one])
            elif len(self._pending) > carried and self._pending[-1][:2] == (lane, "first"):
                payloads = [*self._pending[-1].payloads, *one.payloads]
                self._pending[-1] = self._pending[-1]._replace(payloads=payloads)
            else:
                self._pending.append(one._replace(action="first"))

    def _distrust(self) -> None:
        self._is_pure = False
        self._pending = [
            one._replace(action="done") if one.action == "first" else one for one in self._pending
        ]

    def turn(self, wants: Sequence[tuple[int, int]]) -> list[Claim]:
        """Settle what is pending, and claim: `wants` are pairs of a child's number and how many payloads it can take."""
        self._tried += 1
        carried = len(self._pending)
        self._attempts[self._tried] = carried
        fence = (self._last_turn, self._tried)
        wanted = [(count, self.lanes(number)) for number, count in wants]
        refusals = self._broker.refusals
        claims = self._broker.turn(self.worker_id, fence, self._pending, wanted)
        self._last_turn = self._tried
        self._attempts.clear()
        self._failures = 0
        del self._pending[:carried]
        if self._broker.refusals != refusals:
            self._distrust()
        return claims

    def doubt(self, now: float) -> None:
        """Ask the server what it has seen, before anything else, after a pause that grows with the failures."""
        self.is_in_doubt = True
        self._haunted_until = now + HAUNTED
        self.compare_at = now + backoff(self._failures)
        self._failures += 1

    def look(self) -> None:
        """Compare at once, without a reason to doubt."""
        self.is_in_doubt, self.compare_at = True, 0.0

    def compare(self, known: Iterable[Claim], lanes: Sequence[Lane], now: float) -> None:
        """Drop what the server has executed, and give back what it claimed into `lanes` unseen: what is not `known`.

        Raises:
            Evicted: This supervisor has to register anew, under another id.
        """
        last_turn, contents = self._broker.inflight(self.worker_id, lanes)
        if last_turn is None:
            raise Evicted
        if last_turn in self._attempts:
            del self._pending[: self._attempts[last_turn]]
            self._attempts.clear()
        self._last_turn = last_turn
        self._is_pure = True
        # What the lanes hold if the server has seen all that we have.
        expected: dict[Lane | None, Counter[bytes]] = defaultdict(Counter)
        for lane, payload in known:
            expected[lane][payload] += 1
        for settlement in self._pending:
            expected[settlement.lane].update(settlement.payloads)
        for lane, payloads in zip(lanes, contents, strict=True):
            if strays := list((Counter(payloads) - expected[lane]).elements()):
                self._pending.append(Settlement(lane, "requeue", strays))
                self._distrust()
        self.is_in_doubt = False
        self.compare_at = now + (LOOK_EVERY if self.is_haunted(now) else INTERVAL)
