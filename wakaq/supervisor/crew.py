"""Who gets what: spreads claims and broadcasts over the children, and asks back what waits too long.

Dispatcher thread only. Not for Redis: it neither claims nor settles.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import groupby
from operator import attrgetter, itemgetter
from typing import Any

from wakaq.app import WakaQ
from wakaq.frames import Assign, Recall, Stop
from wakaq.message import name_of
from wakaq.supervisor.child import LONG, MOST_AHEAD, Child
from wakaq.turn import Claim, Settlement

SERVED_AT_ONCE = (
    16  # children that claim in one turn: its keys are counted in children times queues
)


class Crew:
    """The children, and what is on its way to them."""

    def __init__(self, app: WakaQ, send: Callable[[Child, tuple[Any, ...]], None]) -> None:
        self.children: set[Child] = set()
        self.round_trip = 0.0  # seconds, of a turn
        self._by_number: dict[int, Child] = {}  # the newest of each
        self._send = send
        self._async_limit = app.settings.async_concurrency
        self._async_names = frozenset(name for name, task in app.tasks.items() if task.is_async)
        self._async_window = 1
        self._index = {queue.name: number for number, queue in enumerate(app.queues)}
        self._outbox: dict[Child, list[tuple[int, Claim]]] = {}
        self._relays: deque[bytes] = deque()
        self._late_relays: list[tuple[float, bytes]] = []

    def join(self, child: Child) -> None:
        self.children.add(child)
        self._by_number[child.number] = child

    def leave(self, child: Child) -> None:
        self.children.discard(child)
        if self._by_number.get(child.number) is child:
            del self._by_number[child.number]

    def has_idle(self) -> bool:
        return any(child.is_idle for child in self.children)

    def has_waiting(self) -> bool:
        """Whether something waits behind a task."""
        return any(child.waiting > 1 for child in self.children)

    # -- claims ------------------------------------------------------------------------------------

    def wants(self) -> list[tuple[int, int]]:
        """Return pairs of a child's number and how many payloads it can take."""
        wants = []
        for child in self.children:
            if child.can_serve:
                room = child.sync_room(self.round_trip)
                if self._async_names:
                    async_room = child.async_room(self._async_limit)
                    room = max(room, min(async_room, self._async_window))
                if room:
                    wants.append((child.waiting, child.number, room))
        # Those with least to do first, since the queues may not hold enough for all.
        return [(number, room) for _, number, room in sorted(wants)[:SERVED_AT_ONCE]]

    def distribute(self, claims: Sequence[Claim]) -> list[Claim]:
        """Give each claim to a child: the one it was claimed for, if that can take it, else any other.

        Returns those that nobody can take.
        """
        surplus: list[Claim] = []
        for lane, group in groupby(claims, key=itemgetter(0)):
            share = list(group)
            child = self._by_number.get(lane.number)
            if child is not None and child.can_serve and not self._async_names:
                self._assign(child, share)
            else:
                surplus += [claim for claim in share if not self._place(claim)]
        self._send_assigned()
        self._async_window = 1 if surplus else min(2 * self._async_window, MOST_AHEAD)
        return surplus

    def _place(self, claim: Claim) -> bool:
        """Give a claim to a child that could start it; its own one may also take it as work ahead."""
        assert claim.lane is not None
        own = self._by_number.get(claim.lane.number)
        is_async = self._is_async(claim.payload)
        for child in sorted(self.children, key=lambda c: (c is not own, c.waiting)):
            if is_async:
                has_room = child.async_room(self._async_limit) > 0
            else:
                has_room = child.is_idle or (child is own and child.sync_room(self.round_trip) > 0)
            if child.can_serve and has_room:
                self._assign(child, [claim], is_async=is_async)
                return True
        return False

    def _assign(self, child: Child, claims: list[Claim], *, is_async: bool = False) -> None:
        slots = child.assign(claims)
        if is_async:
            child.async_slots.update(slots)
        self._outbox.setdefault(child, []).extend(zip(slots, claims, strict=True))

    def _send_assigned(self) -> None:
        """Send what was assigned: a frame per child and queue."""
        for child, assigned in self._outbox.items():
            for lane, group in groupby(assigned, key=lambda pair: pair[1].lane):
                slots, claims = zip(*group, strict=True)
                payloads = [claim.payload for claim in claims]
                index, number = (self._index[lane.queue.name], lane.number) if lane else (-1, -1)
                self._send(child, Assign(index, number, list(slots), payloads, lane is None))
        self._outbox.clear()

    def _is_async(self, payload: bytes) -> bool:
        return bool(self._async_names) and name_of(payload) in self._async_names

    def recall(self, now: float) -> None:
        """Take back what waits behind a task that turned out to be long, for whoever is free."""
        for child in self.children:
            if child.waiting > 1 and not child.is_recalling:
                progress = child.progress
                if progress.slot >= 0 and now - progress.started_at > LONG:
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

    def relay_later(self, payload: bytes, delay: float) -> None:
        self._late_relays.append((time.monotonic() + delay, payload))

    def next_relay_at(self) -> list[float]:
        return [due for due, _ in self._late_relays]

    def relay(self, now: float) -> None:
        """Have broadcasts run by whoever is free; where nobody is, by whoever will be first."""
        for due, payload in list(self._late_relays):
            if due <= now:
                self._late_relays.remove((due, payload))
                self._relays.append(payload)
        if self._relays:
            for child in sorted(self.children, key=attrgetter("waiting")):
                if child.is_idle or (self._relays and self._is_async(self._relays[0])):
                    self.give_relay(child)

    def give_relay(self, child: Child) -> None:
        """Let a worker that is free, or just was, run a broadcast next: no other will be free sooner."""
        if self._relays and child.can_serve:
            payload = self._relays.popleft()
            self._assign(child, [Claim(None, payload)], is_async=self._is_async(payload))
            self._send_assigned()

    def settle_relay(self, settlement: Settlement) -> None:
        """Decide about a broadcast what Redis would about a payload: run it again, or not."""
        if settlement.action == "delay":
            self.relay_later(settlement.new, settlement.delay)
        elif settlement.action in {"requeue", "redeliver", "retry"}:
            self.relay_later(settlement.new or settlement.payloads[0], 0.0)
