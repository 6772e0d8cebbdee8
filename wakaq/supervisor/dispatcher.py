"""Owns every claim: which payload is in flight, and which child has it. Not for starting or killing processes.

One thread. Others post events to it; nobody else touches its state. While Redis is away, what the children report waits
here, and `Ledger` finds out afterwards what Redis has seen of it.
"""

import contextlib
import logging
import os
import queue as queues
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from wakaq.app import WakaQ
from wakaq.broker import OUTAGES, Broker, RedisError, TurnRefused
from wakaq.frames import Assign, Done, Failed, Outcome, Ready, Recall, Recalled, Stop
from wakaq.message import name_of
from wakaq.supervisor.autopsy import describe, grouped, running_tasks, settle
from wakaq.supervisor.child import LONG, MOST_AHEAD, Child
from wakaq.supervisor.events import (
    Arrived,
    Blocked,
    Booted,
    BootFailed,
    Crashed,
    Doubt,
    Drain,
    Ended,
    Finish,
    Gone,
    Joined,
    Relay,
    Retire,
    Retiring,
)
from wakaq.supervisor.ledger import Evicted, Ledger
from wakaq.supervisor.outage import Outage
from wakaq.turn import Claim, Settlement

logger = logging.getLogger("wakaq.supervisor")

GLANCE = 0.025  # seconds between looks for what is to be recalled
PAUSE = 0.05  # seconds without claims, after one that nobody could take
POLL = 0.05  # seconds between claims while watchers are held
SERVED_AT_ONCE = 16  # children that claim in one turn: its keys are counted in children times queues


class Dispatcher(threading.Thread):
    """The thread; `post` and `wanted` are for the others."""

    def __init__(
        self,
        app: WakaQ,
        broker: Broker,
        outage: Outage,
        register: Callable[[], str],
        tell_main: Callable[[tuple[Any, ...]], None],
    ) -> None:
        """Prepare the thread.

        Args:
            app: The application.
            broker: The way to Redis.
            outage: Where to report that Redis is away, or back.
            register: Registers this supervisor under a new id, which it returns.
            tell_main: Posts an event to the main thread.
        """
        super().__init__(name="wakaq-dispatcher")
        # Fixed.
        self._register = register
        self._app = app
        self._broker = broker
        self._outage = outage
        self._tell_main = tell_main
        self._served = [q for q in app.queues if q.name not in app.settings.exclude_queues]
        self._index = {q.name: number for number, q in enumerate(app.queues)}
        self._concurrency = app.settings.concurrency
        self._async_names = frozenset(name for name, task in app.tasks.items() if task.is_async)

        # Any thread.
        self._events: queues.SimpleQueue[Any] = queues.SimpleQueue()
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        os.set_blocking(self._wake_writer, False)
        # Set while a payload that arrives would start at once: watchers claim only then.
        self.wanted = threading.Event()
        # Each watcher adds itself before it looks at `wanted`, and takes itself out when it has posted what it claimed.
        self.claiming: set[object] = set()

        # This thread only.
        self.ledger = Ledger(broker, self._served)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        self._children: dict[int, Child] = {}  # by number: the newest of each
        self._all: set[Child] = set()
        self._outbox: dict[Child, list[tuple[int, Claim]]] = {}
        self._relays: deque[bytes] = deque()
        self._late_relays: list[tuple[float, bytes]] = []
        self._is_drained = False  # the last turn left nothing in the queues
        self._is_draining = False
        self._finish_by: float | None = None
        self._paused_until = 0.0
        self._polled_at = 0.0
        self._async_window = 1
        self._round_trip = 0.0

    # -- any thread --------------------------------------------------------------------------------------------------

    def post(self, event: tuple[Any, ...]) -> None:
        self._events.put(event)
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes it as well
            os.write(self._wake_writer, b"!")

    # -- the loop ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        try:
            while not self._is_finished():
                self._step()
        except BaseException as error:  # noqa: BLE001 - whatever it is, a supervisor with no dispatcher must not live on
            self._tell_main(Crashed(error))
        finally:
            self._selector.close()

    def _is_finished(self) -> bool:
        if self._finish_by is None or not self._events.empty():
            return False
        return self.ledger.is_settled or time.monotonic() > self._finish_by

    def _step(self) -> None:
        for key, mask in self._selector.select(self._patience(time.monotonic())):
            if key.data is None:
                os.read(self._wake_reader, 4096)
            else:
                self._attend(key.data, mask)
        while not self._events.empty():
            self._handle(self._events.get())
        now = time.monotonic()
        self._recall(now)
        self._relay(now)
        if now >= self.ledger.compare_at:
            self._call(self._compare)
        if not self.ledger.is_in_doubt:
            self._turn(now)
        if self._is_drained and self._may_claim(now) and any(c.is_idle for c in self._all):
            self.wanted.set()
        else:
            self.wanted.clear()

    def _patience(self, now: float) -> float:
        """Return how long nothing but an event needs attention."""
        if not self._events.empty():
            return 0.0
        moments = [due for due, _ in self._late_relays]
        moments.append(self.ledger.compare_at)
        if self._paused_until > now:
            moments.append(self._paused_until)
        if self.ledger.holds_watchers(now):
            moments.append(now + POLL)
        if any(c.waiting > 1 for c in self._all):
            moments.append(now + GLANCE)
        if self._finish_by is not None:
            moments.append(now + POLL)
        return max(0.0, min(moments) - now)

    # -- frames from children ----------------------------------------------------------------------------------------

    def _attend(self, child: Child, mask: int) -> None:
        if mask & selectors.EVENT_WRITE and child.channel.flush():
            self._selector.modify(child.channel, selectors.EVENT_READ, child)
        if mask & selectors.EVENT_READ:
            self._read(child)

    def _read(self, child: Child) -> None:
        try:
            for frame in child.channel.receive():
                self._hear(child, frame)
        except EOFError:
            self._lose(child)

    def _hear(self, child: Child, frame: Any) -> None:
        match frame:
            case Done(slots, timed, busy):
                if timed:
                    child.observe(timed, busy)
                self._paused_until = 0.0
                self.ledger.add(grouped("done", child.take_back(slots)))
                self._give_relay(child)
            case Outcome(slot, action, new, delay):
                (claim,) = child.take_back([slot])
                self._settle(Settlement(claim.lane, action, [claim.payload], new, delay))
                self._give_relay(child)
            case Recalled(slots):
                child.is_recalling = False
                if child.left is not None:
                    child.left += len(slots)
                for settlement in reversed(grouped("requeue", child.take_back(slots))):
                    self._settle(settlement)
            case Ready():
                child.is_ready = True
                self._tell_main(Booted(child))
            case Failed(reason):
                self._tell_main(BootFailed(child, reason))
        if child.left == 0 and not child.is_recalling and child.waiting <= 1 and not child.is_retiring:
            child.is_retiring = True  # what is left to it has begun, so nothing comes back for it to run instead
            self._tell_main(Retiring(child))
        self._dismiss_if_done(child)

    def _lose(self, child: Child) -> None:
        """Settle what a worker had that is gone; all it had sent before was heard."""
        if child not in self._all:
            return
        self._all.discard(child)
        if self._children.get(child.number) is child:
            del self._children[child.number]
        self._selector.unregister(child.channel)
        self._paused_until = 0.0
        victims = [describe(child.assigned[slot].payload) for slot, _ in running_tasks(child)]
        for settlement in settle(child, self._app.settings.max_redeliveries, self.ledger.worker_id):
            self._settle(settlement)
        child.assigned.clear()
        self._tell_main(Gone(child, victims))

    def _dismiss_if_done(self, child: Child) -> None:
        if child.is_retiring and not child.assigned and child.stopped_at is None:
            child.stopped_at = time.monotonic()
            self._send(child, Stop())

    def _settle(self, settlement: Settlement) -> None:
        if settlement.lane is not None:
            self.ledger.add([settlement])
        elif settlement.action in {"requeue", "redeliver", "retry"}:
            self._relays.append(settlement.new or settlement.payloads[0])
        elif settlement.action == "delay":
            self._late_relays.append((time.monotonic() + settlement.delay, settlement.new))

    # -- events from threads -----------------------------------------------------------------------------------------

    def _handle(self, event: Any) -> None:
        match event:
            case Arrived(claim):
                self._distribute([claim])
            case Joined(child):
                self._all.add(child)
                self._children[child.number] = child
                child.left = self._app.settings.max_tasks_per_worker
                self._selector.register(child.channel, selectors.EVENT_READ, child)
            case Doubt():
                self.ledger.doubt(time.monotonic())
            case Relay(payload):
                self._relays.append(payload)
            case Blocked(child):
                if child in self._all:
                    self._watch_writable(child)
            case Ended(child):
                self._read_to_end(child)
            case Retire(child):
                self._retire(child)
            case Drain():
                self._is_draining = True
                for child in list(self._all):
                    self._retire(child)
            case Finish(deadline):
                self._finish_by = deadline

    def _read_to_end(self, child: Child) -> None:
        """Hear what a worker had sent before it exited, even where a process it left behind holds its socket open."""
        while child in self._all:
            try:
                frames = child.channel.receive()
            except EOFError:
                frames = []
            for frame in frames:
                self._hear(child, frame)
            if not frames:
                self._lose(child)

    def _retire(self, child: Child) -> None:
        child.is_retiring = True
        self._ask_back(child)
        self._dismiss_if_done(child)

    # -- broadcasts --------------------------------------------------------------------------------------------------

    def _relay(self, now: float) -> None:
        for due, payload in list(self._late_relays):
            if due <= now:
                self._late_relays.remove((due, payload))
                self._relays.append(payload)
        if self._relays:
            for child in sorted(self._all, key=lambda c: len(c.assigned)):
                if child.is_idle or (child.can_serve and self._is_async(self._relays[0])):
                    self._give_relay(child)

    def _give_relay(self, child: Child) -> None:
        """Let a worker that is free, or just was, run a broadcast next: no other will be free sooner."""
        if self._relays and child.can_serve:
            payload = self._relays.popleft()
            self._assign(child, [Claim(None, payload)], is_async=self._is_async(payload))
            self._send_assigned()

    # -- claims ------------------------------------------------------------------------------------------------------

    def _may_claim(self, now: float) -> bool:
        return not self._is_draining and now >= self._paused_until and not self.ledger.holds_watchers(now)

    def _turn(self, now: float) -> None:
        """Settle and claim, if there is anything to settle, or a child that could be given something."""
        wants: list[tuple[int, int]] = []
        is_polling = self.ledger.holds_watchers(now) and now - self._polled_at >= POLL
        if not self._is_draining and now >= self._paused_until:
            wants = self._wants()
        if self.ledger.is_settled and not (wants and (is_polling or not self._is_drained)):
            return
        self._polled_at = now
        self._call(lambda: self._claim(wants, now))

    def _wants(self) -> list[tuple[int, int]]:
        wants = []
        for child in self._all:
            if child.can_serve:
                room = child.sync_room(self._round_trip)
                if self._async_names:
                    async_room = child.async_room(self._app.settings.async_concurrency)
                    room = max(room, min(async_room, self._async_window))
                if room:
                    wants.append((child.waiting, child.number, room))
        # Those with least to do first, since the queues may not hold enough for all.
        return [(number, room) for _, number, room in sorted(wants)[:SERVED_AT_ONCE]]

    def _claim(self, wants: list[tuple[int, int]], now: float) -> None:
        claims = self.ledger.turn(wants, now)
        took = time.monotonic() - now
        self._round_trip += 0.1 * (min(took, 0.1) - self._round_trip)
        self._is_drained = len(claims) < sum(count for _, count in wants) or not wants and self._is_drained
        self._distribute(claims)

    def _call(self, ask: Callable[[], None]) -> None:
        """Ask something of Redis, and live with it being away."""
        now = time.monotonic()
        try:
            ask()
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

    def _compare(self) -> None:
        now = time.monotonic()
        known = [claim for child in self._all for claim in child.assigned.values()]
        numbers = [*range(1, self._concurrency + 1)]
        if not self.wanted.is_set() and not self.claiming:
            numbers.insert(0, 0)
        try:
            self.ledger.compare(known, numbers, now)
        except Evicted:
            logger.warning("Declared dead by another supervisor, or Redis lost its data: going on under a new id")
            for child in self._all:
                self._ask_back(child)
            self.ledger.rename(self._register())

    # -- assignments -------------------------------------------------------------------------------------------------

    def _distribute(self, claims: Sequence[Claim]) -> None:
        """Give each claim to a child: the one it was claimed for, if that can take it, else any other."""
        surplus: list[Claim] = []
        for lane, group in groupby(claims, key=itemgetter(0)):
            share = list(group)
            child = self._children.get(lane.number)
            if child is not None and child.can_serve and not self._async_names:
                self._assign(child, share)
            else:
                surplus += [claim for claim in share if not self._place(claim)]
        self._send_assigned()
        self._async_window = 1 if surplus else min(2 * self._async_window, MOST_AHEAD)
        if surplus:
            self.ledger.add(reversed(grouped("requeue", surplus)))
            self._paused_until = time.monotonic() + PAUSE

    def _place(self, claim: Claim) -> bool:
        """Give a claim to a child that could start it; its own one may also take it as work ahead."""
        assert claim.lane is not None
        own = self._children.get(claim.lane.number)
        limit = self._app.settings.async_concurrency
        is_async = self._is_async(claim.payload)
        for child in sorted(self._all, key=lambda c: (c is not own, c.waiting)):
            if is_async:
                has_room = child.async_room(limit) > 0
            else:
                has_room = child.is_idle or (child is own and child.sync_room(self._round_trip) > 0)
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

    def _recall(self, now: float) -> None:
        """Take back what waits behind a task that turned out to be long, for whoever is free."""
        for child in self._all:
            if child.waiting > 1 and not child.is_recalling:
                progress = child.progress
                if progress.slot >= 0 and now - progress.started_at > LONG:
                    self._ask_back(child)

    def _ask_back(self, child: Child) -> None:
        child.is_recalling = True
        self._send(child, Recall())

    def _send(self, child: Child, frame: tuple[Any, ...]) -> None:
        if not child.channel.send(frame):
            self._watch_writable(child)

    def _watch_writable(self, child: Child) -> None:
        self._selector.modify(child.channel, selectors.EVENT_READ | selectors.EVENT_WRITE, child)
