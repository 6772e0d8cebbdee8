"""Asks Redis: settles and claims by turns, or has watchers claim, and goes on when it was away. Not for who gets what.

Dispatcher thread only.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from wakaq.broker import Broker, TurnRefused
from wakaq.client import OUTAGES, RedisError
from wakaq.supervisor.child import Child
from wakaq.supervisor.crew import Crew
from wakaq.supervisor.lease import Lease
from wakaq.supervisor.ledger import Evicted, Ledger
from wakaq.supervisor.service import Outage
from wakaq.supervisor.watcher import Watcher, Watchers
from wakaq.turn import Claim, Settlement, grouped

logger = logging.getLogger("wakaq.supervisor")

POLL = 0.025  # seconds between claims while watchers rest
# Seconds; what arrives faster than that is more than watchers should take, one by one.
BURST = 0.005


class Claimer:
    """Claims for the crew, and settles what it reports."""

    def __init__(  # noqa: PLR0913, PLR0917 - what it connects
        self,
        broker: Broker,
        ledger: Ledger,
        crew: Crew,
        watchers: Watchers,
        lease: Lease,
        outage: Outage,
    ) -> None:
        self._broker = broker
        self.ledger = ledger
        self._crew = crew
        self._watchers = watchers
        self._lease = lease
        self._outage = outage
        self.is_drained = False  # the last turn left nothing in the queues
        self.is_draining = False  # nothing is to be claimed any more
        self._answered_at = 0.0  # when a watcher last had something
        self._has_looked = False  # for what was claimed unseen, at the end

    def settle(self, settlement: Settlement) -> None:
        if settlement.lane is None:
            self._crew.settle_relay(settlement)
        else:
            self.ledger.add([settlement])

    def ack(self, child: Child, claims: Iterable[Claim]) -> None:
        self.ledger.ack(claims, None if self._crew.has_async else child.number)

    def requeue(self, claims: Sequence[Claim]) -> None:
        """Put claims back to the front of their queues, in their order: each group goes in front of the one before."""
        for settlement in reversed(grouped("requeue", claims)):
            self.settle(settlement)

    def step(self, now: float) -> None:
        """Do what is to be asked of Redis now."""
        if self._watchers.drop_silent(now):
            self.ledger.doubt(now)
        if self._lease.lost == self.ledger.worker_id:
            self._call(self._rename)
        is_resting = self._rests(now)
        if is_resting:
            self.is_drained = False  # turns take what watchers do not
        elif now >= self.ledger.compare_at:
            self._call(self._compare, now)
        wants = self._wants(now)
        is_due = not self.ledger.is_settled or (wants and not self.is_drained)
        if is_due and not self.ledger.is_in_doubt:
            self._call(self._turn, wants, now)
        if self.is_drained and not is_resting and self._may_claim() and self._crew.has_idle(now):
            self._call(self._watchers.watch, self.ledger.lanes(0), now)

    def _may_claim(self) -> bool:
        # With an old lease others may have declared this supervisor dead: what a watcher claimed then, nobody would find.
        return not (self.is_draining or self.ledger.is_in_doubt) and self._lease.is_fresh()

    def _wants(self, now: float) -> list[tuple[int, int]]:
        return self._crew.wants(now) if self._may_claim() else []

    def _rests(self, now: float) -> bool:
        """Whether watchers are to come to their ends and rest: only then what was claimed unseen shows in their lanes."""
        is_due = now >= self.ledger.compare_at and not self.ledger.is_in_doubt
        return is_due and self.ledger.is_haunted(now) and self._watchers.is_waiting

    def next_step_at(self, now: float) -> float:
        if self._rests(now):
            return now + POLL
        # The last turn may have left work in the queues, and room for it: it asked for few, to see their kind first.
        has_appetite = not self.is_drained and bool(self._wants(now))
        return now if has_appetite else self.ledger.compare_at

    def ping(self) -> None:
        """Make a round trip."""
        self._call(self._broker.ping)

    def hear(self, watcher: Watcher) -> None:
        """Take what a watcher has claimed."""
        self._call(self._answer, watcher)

    def is_settled(self) -> bool:
        """Whether nothing is owed and nothing in flight, as a last look tells."""
        if not self.ledger.is_settled or self._watchers.is_waiting:
            return False
        if not self._has_looked:
            self._has_looked = True
            self.ledger.look()
        return not self.ledger.is_in_doubt

    def is_haunted(self) -> bool:
        """Whether something may yet be claimed for this supervisor, although the thread has ended."""
        return self._watchers.is_waiting or self.ledger.is_haunted(time.monotonic())

    def _call(self, ask: Callable[..., None], *args: Any) -> None:
        """Ask something of Redis, and live with it being away."""
        now = time.monotonic()
        try:
            ask(*args)
        except OUTAGES as error:
            self._outage.begin(error)
            self.ledger.doubt(now)
        except TurnRefused:
            self.ledger.doubt(now)
        except RedisError:
            logger.exception("Redis refuses a call")
            self.ledger.doubt(now)
        else:
            self._outage.end(now)

    def _turn(self, wants: list[tuple[int, int]], now: float) -> None:
        """Settle and claim."""
        claims = self.ledger.turn(wants)
        took = min(time.monotonic() - now, 0.1)
        self._crew.round_trip += 0.1 * (took - self._crew.round_trip)
        if wants:
            self.is_drained = len(claims) < sum(count for _, count in wants)
        self.requeue(self._crew.distribute(claims))

    def _answer(self, watcher: Watcher) -> None:
        now = time.monotonic()
        if claim := self._watchers.answer(watcher):
            self.requeue(self._crew.distribute([claim]))
            os.sched_yield()  # the worker may have been woken on this very core, and is to go first
            if now - self._answered_at < BURST:
                self.is_drained = False  # a turn takes many at a time
            self._answered_at = now
        elif self.ledger.is_haunted(now):
            # Nothing is being claimed into this lane, for now: what is in there, and is not ours, was claimed unseen.
            self.ledger.compare_at = now

    def _compare(self, now: float) -> None:
        known = [claim for child in self._crew.children for claim in child.assigned.values()]
        lanes = self._watchers.settled(self.ledger.lanes(0))
        for number in range(1, self._broker.settings.concurrency + 1):
            lanes += self.ledger.lanes(number)
        try:
            self.ledger.compare(known, lanes, now)
        except Evicted:
            self._rename()

    def _rename(self) -> None:
        logger.warning(
            "Declared dead by another supervisor, or Redis lost its data: going on under a new id"
        )
        for child in self._crew.children:
            self._crew.ask_back(child)
        self.ledger.rename(self._lease.register())
