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
from wakaq.turn import Claim, Lane, Settlement

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
        self.rename("")
        # When to compare with the server; before that, after a failure, nothing is asked of it.
        self.compare_at = 0.0
        self.is_in_doubt = False
        # A watcher's call that was cut off may claim until its time on the server is over: watchers rest until then.
        self._calm_at = 0.0
        # Or much later, when it had not reached the server yet: until then watchers rest before each comparison, too.
        self._haunted_until = 0.0

    def rename(self, worker_id: str) -> None:
        """Go on under a new id; what is pending names its lanes itself."""
        self.worker_id = worker_id
        self._last_turn = 0
        self._tried = 0
        # Turn number -> how many of the pending settlements it carried.
        self._attempts: dict[int, int] = {}
        self._lanes: dict[int, list[Lane]] = {}

    @property
    def is_settled(self) -> bool:
        return not self._pending and not self.is_in_doubt

    def is_haunted(self, now: float) -> bool:
        """Whether something may yet be claimed for this supervisor by a call whose reply nobody awaits."""
        return now < self._haunted_until

    def holds_watchers(self, now: float) -> bool:
        if self.is_in_doubt or now < self._calm_at:
            return True
        rest = 2 * self._broker.settings.wait_timeout
        return self.is_haunted(now) and self.compare_at - now < rest < LOOK_EVERY

    def lanes(self, number: int) -> list[Lane]:
        """Return a child's lanes, in the order of the queues' priorities."""
        lanes = self._lanes.get(number)
        if lanes is None:
            lanes = [self._broker.lane(queue, self.worker_id, number) for queue in self._served]
            self._lanes[number] = lanes
        return lanes

    def add(self, settlements: Iterable[Settlement]) -> None:
        self._pending += [s for s in settlements if s.lane is not None]

    def turn(self, wants: Sequence[tuple[int, int]]) -> list[Claim]:
        """Settle what is pending, and claim: `wants` are pairs of a child's number and how many payloads it can take."""
        self._tried += 1
        carried = len(self._pending)
        self._attempts[self._tried] = carried
        fence = (self._last_turn, self._tried)
        wanted = [(count, self.lanes(number)) for number, count in wants]
        claims = self._broker.turn(self.worker_id, fence, self._pending, wanted)
        self._last_turn = self._tried
        self._attempts.clear()
        self._failures = 0
        del self._pending[:carried]
        return claims

    def ping(self) -> None:
        self._broker.ping()

    def doubt(self, now: float) -> None:
        """Ask the server what it has seen, before anything else, after a pause that grows with the failures."""
        self.is_in_doubt = True
        self._haunted_until = now + HAUNTED
        self._calm_at = now + 2 * self._broker.settings.wait_timeout
        self.compare_at = now + backoff(self._failures)
        self._failures += 1

    def look(self) -> None:
        """Compare at once, without a reason to doubt."""
        self.is_in_doubt, self.compare_at = True, 0.0

    def compare(self, known: Iterable[Claim], lanes: Sequence[Lane], now: float) -> None:
        """Drop what the server has executed, and give back what it claimed for us unseen.

        Args:
            known: Every claim that some child has.
            lanes: Where to look.
            now: Monotonic time.

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
        expected = self._expected(known)
        for lane, payloads in zip(lanes, contents, strict=True):
            strays = list((Counter(payloads) - expected[lane]).elements())
            if strays:
                self._pending.append(Settlement(lane, "requeue", strays))
        self.is_in_doubt = False
        # Once more when a call that was cut off can no longer claim, and then now and then.
        later = LOOK_EVERY if self.is_haunted(now) else INTERVAL
        self.compare_at = self._calm_at if now < self._calm_at else now + later

    def _expected(self, known: Iterable[Claim]) -> dict[Lane, Counter[bytes]]:
        """Return what the lanes hold if the server has seen all that we have."""
        expected: dict[Lane, Counter[bytes]] = defaultdict(Counter)
        for lane, payload in known:
            if lane is not None:
                expected[lane][payload] += 1
        for settlement in self._pending:
            if settlement.lane is not None:
                expected[settlement.lane].update(settlement.payloads)
        return expected
