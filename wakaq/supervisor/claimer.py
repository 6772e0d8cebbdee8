"""Asks Redis: when to claim, by a turn or by watchers, and how to go on while Redis is away. Not for who gets what.

Dispatcher thread only.
"""

import functools
import logging
import time
from collections.abc import Callable, Sequence

from wakaq.broker import TurnRefused
from wakaq.client import OUTAGES, RedisError
from wakaq.supervisor.autopsy import grouped
from wakaq.supervisor.crew import Crew
from wakaq.supervisor.lease import Lease
from wakaq.supervisor.ledger import Evicted, Ledger
from wakaq.supervisor.outage import Outage
from wakaq.supervisor.watcher import Watcher, Watchers
from wakaq.turn import Claim, Settlement

logger = logging.getLogger("wakaq.supervisor")

POLL = 0.05  # seconds between claims while watchers rest


class Claimer:
    """Claims for the crew, and settles what it reports."""

    def __init__(
        self, ledger: Ledger, crew: Crew, watchers: Watchers, lease: Lease, outage: Outage
    ) -> None:
        self._ledger = ledger
        self._crew = crew
        self._watchers = watchers
        self._lease = lease
        self._outage = outage
        self.is_drained = False  # the last turn left nothing in the queues
        self.is_draining = False  # nothing is to be claimed any more
        self._polled_at = 0.0

    def step(self, now: float) -> None:
        """Do what is to be asked of Redis now."""
        if self._watchers.drop_silent(now):
            self._ledger.doubt(now)
        if self._lease.lost == self._ledger.worker_id:
            self._call(self._rename)
        if now >= self._ledger.compare_at:
            self._call(self._compare)
        if not self._ledger.is_in_doubt:
            self._turn(now)
        if self.is_drained and self._may_claim(now) and self._crew.has_idle(now):
            self._call(self._watch)

    def next_step_at(self, now: float) -> float:
        if self._has_appetite(now):
            return now
        moments = [self._ledger.compare_at, self._watchers.next_look_at(now)]
        moments += self._crew.next_probe_at(now)
        if self._watchers_rest(now):
            moments.append(now + POLL)
        return min(moments)

    def settle(self, settlement: Settlement) -> None:
        """Have a settlement carried out, with the next turn or, for a broadcast, here."""
        if settlement.lane is None:
            self._crew.settle_relay(settlement)
        else:
            self._ledger.add([settlement])

    def requeue(self, claims: Sequence[Claim]) -> None:
        """Put claims back to the front of their queues, in their order."""
        # Each group goes in front of the one before.
        for settlement in reversed(grouped("requeue", claims)):
            self.settle(settlement)

    def _has_appetite(self, now: float) -> bool:
        """Whether the last turn left work in the queues, and room for it: it asked for few, to see their kind first."""
        is_able = not self.is_drained and not self.is_draining and not self._ledger.is_in_doubt
        return is_able and bool(self._crew.wants(now))

    def _may_claim(self, now: float) -> bool:
        return not self.is_draining and not self._watchers_rest(now)

    def _watchers_rest(self, now: float) -> bool:
        """Whether to claim only by turns, which the server refuses if others have declared this supervisor dead."""
        return self._ledger.holds_watchers(now) or not self._lease.is_fresh()

    def _turn(self, now: float) -> None:
        """Settle and claim, if there is anything to settle, or a child that could be given something."""
        wants: list[tuple[int, int]] = []
        is_polling = self._watchers_rest(now) and now - self._polled_at >= POLL
        if not self.is_draining:
            wants = self._crew.wants(now)
        if self._ledger.is_settled and not (wants and (is_polling or not self.is_drained)):
            return
        self._polled_at = now
        self._call(functools.partial(self._claim, wants, now))

    def _claim(self, wants: list[tuple[int, int]], now: float) -> None:
        claims = self._ledger.turn(wants)
        took = time.monotonic() - now
        self._crew.round_trip += 0.1 * (min(took, 0.1) - self._crew.round_trip)
        self.is_drained = len(claims) < sum(count for _, count in wants) or (
            not wants and self.is_drained
        )
        self._distribute(claims)

    def _watch(self) -> None:
        self._watchers.watch(self._ledger.lanes(0))

    def ping(self) -> None:
        """Make a round trip."""
        self._call(self._ledger.ping)

    def hear(self, watcher: Watcher) -> None:
        """Take what a watcher has claimed."""
        self._call(functools.partial(self._answer, watcher))

    def _answer(self, watcher: Watcher) -> None:
        claim = self._watchers.answer(watcher)
        if claim is not None:
            self._distribute([claim])

    def _call(self, ask: Callable[[], None]) -> None:
        """Ask something of Redis, and live with it being away."""
        now = time.monotonic()
        try:
            ask()
        except OUTAGES as error:
            self._outage.begin(error)
            self._ledger.doubt(now)
        except TurnRefused:
            self._ledger.doubt(now)
        except RedisError:
            logger.exception("Redis refuses a call")
            self._ledger.doubt(now)
        else:
            self._outage.end(now)

    def _compare(self) -> None:
        now = time.monotonic()
        known = [claim for child in self._crew.children for claim in child.assigned.values()]
        lanes = [lane for number in self._crew.numbers for lane in self._ledger.lanes(number)]
        lanes += self._watchers.settled(self._ledger.lanes(0))
        try:
            self._ledger.compare(known, lanes, now)
        except Evicted:
            self._rename()

    def _rename(self) -> None:
        logger.warning(
            "Declared dead by another supervisor, or Redis lost its data: going on under a new id"
        )
        for child in self._crew.children:
            self._crew.ask_back(child)
        self._ledger.rename(self._lease.register())

    def _distribute(self, claims: Sequence[Claim]) -> None:
        surplus = self._crew.distribute(claims)
        if surplus:  # such as an async task, where every worker runs as many as it may
            self.requeue(surplus)
