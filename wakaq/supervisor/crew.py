"""Who gets what: spreads claims and broadcasts over the children, and asks back what waits too long.

Dispatcher thread only. Not for Redis: it neither claims nor settles.
"""

import logging
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from operator import attrgetter, itemgetter
from typing import Any

from wakaq.app import WakaQ
from wakaq.frames import Assign, Recall, Stop
from wakaq.message import describe, name_of
from wakaq.supervisor.child import HORIZON, MOST_AHEAD, Child
from wakaq.turn import Claim, Settlement

logger = logging.getLogger("wakaq.supervisor")

PAUSE = 0.05  # seconds without claims of a kind, after one that nobody could take
MOST_IN_TURN = 16  # children that claim in one turn: its keys are counted in children times queues


class Crew:
    """The children, and what is on its way to them."""

    def __init__(self, app: WakaQ, send: Callable[[Child, tuple[Any, ...]], None]) -> None:
        self.children: set[Child] = set()
        self.round_trip = 0.0  # seconds, of a turn
        # Of the children, those that could take something, and those where something waits behind a task: kept at every
        # change of a child, so that no step looks at hundreds of them.
        self._hungry: set[Child] = set()
        self._crowded: set[Child] = set()
        # When to look at children whose task is expected to end.
        self._ending: dict[Child, float] = {}
        self._by_number: dict[int, list[Child]] = {}  # the oldest first; one of them can serve
        self._send = send
        self._async_limit = app.settings.async_concurrency
        self._async_names = frozenset(name for name, task in app.tasks.items() if task.is_async)
        self.has_async = bool(self._async_names)
        # What is claimed shows its kind only then. So this is how many to claim for one child in the hope that they are
        # async, and until when nothing is claimed for one that could take only this kind: the last one was of the other.
        self._async_window = 1
        self._no_sync_until = self._no_async_until = 0.0
        self._index = {queue.name: number for number, queue in enumerate(app.queues)}
        self._outbox: dict[Child, list[tuple[int, Claim]]] = {}
        # Broadcasts that nobody has yet, with the moment when they are due.
        self._relays: list[tuple[float, bytes]] = []

    def join(self, child: Child) -> None:
        self.children.add(child)
        self._by_number.setdefault(child.number, []).append(child)
        child.is_first = False
        self._promote_successor(child.number)

    def leave(self, child: Child) -> None:
        for group in (self.children, self._hungry, self._crowded):
            group.discard(child)
        self._ending.pop(child, None)
        self._by_number[child.number].remove(child)
        self._promote_successor(child.number)

    def update(self, child: Child) -> None:
        """Look at a child that has changed."""
        is_hungry = child.can_serve and (self._sync_room(child) or self._async_room(child))
        (self._hungry.add if is_hungry else self._hungry.discard)(child)
        (self._crowded.add if child.waiting > 1 else self._crowded.discard)(child)
        self._ending.pop(child, None)
        next_at = child.next_at(self.round_trip)
        if child.waiting == 1 and child.can_serve and next_at > time.monotonic():
            self._ending[child] = next_at
        if child.is_retiring and not child.waiting:
            self._promote_successor(child.number)

    def _promote_successor(self, number: int) -> None:
        """Let the next worker of a number serve: once no other runs sync tasks, so that there are never more than asked for."""
        for child in self._by_number.get(number, []):
            if not child.is_first:
                child.is_first = True
                self.update(child)
            if not (child.is_retiring and not child.waiting):
                return

    def has_idle(self, now: float) -> bool:
        """Whether a payload that arrives now would start now, as far as can be told."""
        return any(
            (child.is_idle or self._async_room(child)) and self._room(child, now)
            for child in self._hungry
        )

    def has_waiting(self) -> bool:
        """Whether something waits behind a task."""
        return bool(self._crowded)

    def next_moments(self, now: float) -> list[float]:
        """Return when claims that were put off, and broadcasts, are due."""
        moments = [due for due, _ in self._relays if due > now]
        if self._ending:  # with some time in which any other turn takes these claims along
            moments.append(min(self._ending.values()) + HORIZON / 2)
        probes = (self._no_sync_until, self._no_async_until)
        return moments + [at for at in probes if at > now and self._hungry]

    # -- claims ------------------------------------------------------------------------------------

    def _sync_room(self, child: Child) -> int:
        return child.sync_room(self.round_trip)

    def _async_room(self, child: Child) -> int:
        return child.async_room(self._async_limit) if self.has_async else 0

    def _room(self, child: Child, now: float) -> int:
        """Return how many payloads of unknown kinds to claim for a child."""
        sync_room = self._sync_room(child)
        if not self.has_async:
            return sync_room
        async_room = min(self._async_room(child), self._async_window)
        if not async_room:
            return sync_room if now >= self._no_sync_until else 0
        if not sync_room:
            return async_room if now >= self._no_async_until else 0
        return max(sync_room, async_room)

    def anticipate(self, now: float) -> None:
        """Give those whose task is about to end a broadcast, or have something claimed for them to run next."""
        for child in [child for child, moment in self._ending.items() if moment <= now]:
            if not self.give_relay(child, now):
                self.update(child)

    def wants(self, now: float) -> list[tuple[int, int]]:
        """Return pairs of a child's number and how many payloads it can take."""
        rooms = [(child.waiting, child.number, self._room(child, now)) for child in self._hungry]
        # Those with least to do first, since the queues may not hold enough for all.
        rooms = sorted(room for room in rooms if room[2])[:MOST_IN_TURN]
        return [(number, room) for _, number, room in rooms]

    def distribute(self, claims: Sequence[Claim]) -> list[Claim]:
        """Give each claim to a child: the one it was claimed for, if that can take it, else any other.

        Returns those that nobody can take.
        """
        surplus: list[Claim] = []
        for lane, group in groupby(claims, key=itemgetter(0)):
            share = list(group)
            for child in self._by_number.get(lane.number, ()):
                share = self._give(child, share)
            surplus += [claim for claim in share if not self._place(claim)]
        self._send_assigned()
        if self.has_async:
            self._learn(claims, surplus)
        return surplus

    def _learn(self, claims: Sequence[Claim], surplus: list[Claim]) -> None:
        """Let what was claimed tell what to claim next."""
        kinds = {self._is_async(claim.payload) for claim in surplus}
        until = time.monotonic() + PAUSE
        if True in kinds:
            self._no_sync_until = until
        if False in kinds:
            self._no_async_until = until
            self._async_window = 1
        elif claims:
            self._async_window = min(2 * self._async_window, MOST_AHEAD)

    def _give(self, child: Child, claims: list[Claim]) -> list[Claim]:
        """Give a child what was claimed for it, as far as its kind has room there; returns the rest."""
        if not claims or not child.can_serve:
            return claims
        if not self.has_async:
            self._assign(child, claims)
            return []
        rooms = self._sync_room(child), self._async_room(child)
        shares: tuple[list[Claim], list[Claim]] = [], []
        rest: list[Claim] = []
        for claim in claims:
            is_async = self._is_async(claim.payload)
            share = shares[is_async]
            (share if len(share) < rooms[is_async] else rest).append(claim)
        for kind, share in enumerate(shares):
            if share:
                self._assign(child, share, is_async=bool(kind))
        return rest

    def _place(self, claim: Claim) -> bool:
        """Give a claim to any child that could start it: an async one to whoever has the fewest."""
        is_async = self._is_async(claim.payload)
        takers = [
            child
            for child in self._hungry
            if (self._async_room(child) if is_async else child.is_idle and child.free)
        ]
        if not takers:
            return False
        taker = min(takers, key=lambda child: len(child.async_slots)) if is_async else takers[0]
        self._assign(taker, [claim], is_async=is_async)
        return True

    def _assign(self, child: Child, claims: list[Claim], *, is_async: bool = False) -> None:
        slots = child.assign(claims)
        if is_async:
            child.async_slots.update(dict.fromkeys(slots, time.monotonic()))
        self._outbox.setdefault(child, []).extend(zip(slots, claims, strict=True))

    def _send_assigned(self) -> None:
        """Send what was assigned: a frame per child and queue; only then is there time for anything else."""
        outbox, self._outbox = self._outbox, {}
        for child, assigned in outbox.items():
            for lane, group in groupby(assigned, key=lambda pair: pair[1].lane):
                slots, claims = zip(*group, strict=True)
                payloads = [claim.payload for claim in claims]
                index, number = (self._index[lane.queue.name], lane.number) if lane else (-1, -1)
                self._send(child, Assign(index, number, list(slots), payloads, lane is None))
            self.update(child)

    def _is_async(self, payload: bytes) -> bool:
        return self.has_async and name_of(payload) in self._async_names

    def recall(self, now: float) -> None:
        """Take back what waits too long behind other tasks, for whoever is free."""
        for child in self._crowded:
            if child.has_too_much(now, self.round_trip):
                self.ask_back(child)

    def ask_back(self, child: Child) -> None:
        child.is_recalling = True
        self._send(child, Recall())

    def dismiss_if_done(self, child: Child) -> None:
        """Have a child exit that is to retire, and has nothing left."""
        if child.is_retiring and not child.assigned and child.stopped_at is None:
            child.stopped_at = time.monotonic()
            self._send(child, Stop())

    # -- broadcasts --------------------------------------------------------------------------------

    def relay_later(self, payload: bytes, delay: float = 0.0) -> None:
        self._relays.append((time.monotonic() + delay, payload))

    def relay(self, now: float) -> None:
        """Have broadcasts run by whoever is free; where nobody is, they wait for `give_relay`."""
        if self._relays:
            for child in sorted(self.children, key=attrgetter("waiting")):
                while self.give_relay(child, now, is_free=child.is_idle):
                    pass

    def give_relay(self, child: Child, now: float, *, is_free: bool = True) -> bool:
        """Let a worker that is free, or just was, run a broadcast next: no other will be free sooner."""
        for relay in self._relays:
            due, payload = relay
            is_async = self._is_async(payload)
            has_room = self._async_room(child) if is_async else is_free and child.free
            if due <= now and child.can_serve and has_room:
                self._relays.remove(relay)
                self._assign(child, [Claim(None, payload)], is_async=is_async)
                self._send_assigned()
                return True
        return False

    def settle_relay(self, settlement: Settlement) -> None:
        """Decide about a broadcast what Redis would about a payload: run it again, or not."""
        payload = settlement.payloads[0]
        if settlement.action in {"requeue", "redeliver", "retry", "delay"}:
            self.relay_later(settlement.new or payload, settlement.delay)
        elif settlement.action == "dead":
            logger.error("Broadcast %s is given up, and leaves no dead letter", describe(payload))
