"""Owns every claim: which payload is in flight, and which child has it. Not for starting or killing processes.

One thread. Others post events to it; nobody else touches its state. While Redis is away, what the children report waits
here, and `Ledger` finds out afterwards what Redis has seen of it.
"""

import contextlib
import functools
import logging
import os
import queue as queues
import selectors
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from wakaq.app import WakaQ
from wakaq.broker import Broker, TurnRefused
from wakaq.client import OUTAGES, RedisError
from wakaq.frames import Done, Failed, Outcome, Ready, Recalled
from wakaq.message import describe
from wakaq.supervisor.autopsy import grouped, running_tasks, settle
from wakaq.supervisor.child import Child
from wakaq.supervisor.crew import Crew
from wakaq.supervisor.events import (
    Blocked,
    Booted,
    BootFailed,
    Crashed,
    Drain,
    Ended,
    Finish,
    Gone,
    Joined,
    Relay,
    Retire,
    Retiring,
)
from wakaq.supervisor.lease import Lease
from wakaq.supervisor.ledger import Evicted, Ledger
from wakaq.supervisor.outage import Outage
from wakaq.supervisor.watcher import Watcher
from wakaq.turn import Claim, Settlement

logger = logging.getLogger("wakaq.supervisor")

GLANCE = 0.025  # seconds between looks for what is to be recalled
WATCH = 1.0  # seconds between looks whether a watcher should wait
POLL = 0.05  # seconds between claims while watchers rest


class Dispatcher(threading.Thread):
    """The thread; `post` is for the others."""

    def __init__(
        self,
        app: WakaQ,
        broker: Broker,
        outage: Outage,
        lease: Lease,
        tell_main: Callable[[tuple[Any, ...]], None],
    ) -> None:
        """Prepare the thread.

        Args:
            app: The application.
            broker: The way to Redis.
            outage: Where to report that Redis is away, or back.
            lease: Registers this supervisor under a new id, where it was declared dead.
            tell_main: Posts an event to the main thread.
        """
        super().__init__(name="wakaq-dispatcher")
        # Fixed.
        self._lease = lease
        self._app = app
        self._broker = broker
        self._outage = outage
        self._tell_main = tell_main
        self._concurrency = app.settings.concurrency

        # Any thread.
        self._events: queues.SimpleQueue[Any] = queues.SimpleQueue()
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        os.set_blocking(self._wake_writer, False)

        # This thread only.
        served = [q for q in app.queues if q.name not in app.settings.exclude_queues]
        self.ledger = Ledger(broker, served)
        self._watchers = [Watcher(broker, queue) for queue in served]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        self._crew = Crew(app, self._send)
        self._is_drained = False  # the last turn left nothing in the queues
        self._is_draining = False
        self._finish_by: float | None = None
        self._has_looked = False  # for what was claimed unseen, at the end
        self._polled_at = 0.0

    # -- any thread --------------------------------------------------------------------------------

    def post(self, event: tuple[Any, ...]) -> None:
        self._events.put(event)
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes it as well
            os.write(self._wake_writer, b"!")

    # -- the loop ----------------------------------------------------------------------------------

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
        if time.monotonic() > self._finish_by:
            return True
        if not self.ledger.is_settled or any(watcher.is_waiting for watcher in self._watchers):
            return False
        if not self._has_looked:
            self._has_looked = True
            self.ledger.look()
            return False
        return True

    def is_haunted(self) -> bool:
        """Whether something may yet be claimed for this supervisor, although the thread has ended."""
        is_waiting = any(watcher.is_waiting for watcher in self._watchers)
        return is_waiting or self.ledger.is_haunted(time.monotonic())

    def _step(self) -> None:
        for key, mask in self._selector.select(self._patience(time.monotonic())):
            match key.data:
                case Child() as child:
                    self._attend(child, mask)
                case Watcher() as watcher:
                    self._call(functools.partial(self._answer, watcher))
                case _:
                    os.read(self._wake_reader, 4096)
        while not self._events.empty():
            self._handle(self._events.get())
        now = time.monotonic()
        self._drop_silent_watchers(now)
        self._crew.recall(now)
        self._crew.relay(now)
        if now >= self.ledger.compare_at:
            self._call(self._compare)
        if not self.ledger.is_in_doubt:
            self._turn(now)
        if self._is_drained and self._may_claim(now) and self._crew.has_idle(now):
            self._call(self._watch)

    def _patience(self, now: float) -> float:
        """Return how long nothing but an event needs attention."""
        if not self._events.empty() or self._has_appetite(now):
            return 0.0
        moments = self._crew.next_relay_at()
        moments.append(self.ledger.compare_at)
        moments += self._crew.next_probe_at(now)
        if self._watchers_rest(now):
            moments.append(now + POLL)
        for watcher in self._watchers:
            moments.append(watcher.deadline if watcher.is_waiting else now + WATCH)
        if self._crew.has_waiting():
            moments.append(now + GLANCE)
        if self._finish_by is not None:
            moments.append(now + POLL)
        return max(0.0, min(moments) - now)

    def _has_appetite(self, now: float) -> bool:
        """Whether the last turn left work in the queues, and room for it: it asked for few, to see their kind first."""
        is_able = not self._is_drained and not self._is_draining and not self.ledger.is_in_doubt
        return is_able and bool(self._crew.wants(now))

    # -- frames from children ----------------------------------------------------------------------

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
                self.ledger.add(grouped("done", child.take_back(slots)))
                self._crew.give_relay(child)
            case Outcome(slot, action, new, delay):
                (claim,) = child.take_back([slot])
                self._settle(Settlement(claim.lane, action, [claim.payload], new, delay))
                self._crew.give_relay(child)
            case Recalled(slots):
                self._requeue(child.recalled(slots))
            case Ready():
                child.is_ready = True
                # What came while nobody could take it is claimed by priority, not by the fastest watcher.
                self._is_drained = False
                self._tell_main(Booted(child))
            case Failed(reason):
                self._tell_main(BootFailed(child, reason))
            case _:
                raise AssertionError(frame)
        self._replace_if_last(child)
        self._crew.dismiss_if_done(child)
        self._crew.update(child)

    def _lose(self, child: Child) -> None:
        """Settle what a worker had that is gone; all it had sent before was heard."""
        if child not in self._crew.children:
            return
        self._crew.leave(child)
        self._selector.unregister(child.channel)
        victims = [describe(child.assigned[slot].payload) for slot, _ in running_tasks(child)]
        for settlement in settle(child, self._app.settings.max_redeliveries, self.ledger.worker_id):
            self._settle(settlement)
        child.assigned.clear()
        self._tell_main(Gone(child, victims))

    def _settle(self, settlement: Settlement) -> None:
        if settlement.lane is None:
            self._crew.settle_relay(settlement)
        else:
            self.ledger.add([settlement])

    # -- events from threads -----------------------------------------------------------------------

    def _handle(self, event: Any) -> None:
        match event:
            case Relay(payload):
                self._crew.relay_later(payload, 0.0)
            case Drain():
                self._is_draining = True
                for child in list(self._crew.children):
                    self._retire(child)
            case Finish(deadline):
                self._finish_by = deadline
            case _:
                self._handle_child(event, event.child)

    def _handle_child(self, event: Any, child: Child) -> None:
        if isinstance(event, Joined):
            self._crew.join(child)
            child.left = self._app.settings.max_tasks_per_worker
            self._selector.register(child.channel, selectors.EVENT_READ, child)
        if child not in self._crew.children:  # it is gone already
            return
        match event:
            case Blocked():
                self._watch_writable(child)
            case Ended():
                self._read_to_end(child)
            case Retire():
                self._retire(child)
            case _:
                assert isinstance(event, Joined)

    def _read_to_end(self, child: Child) -> None:
        """Hear what a worker had sent before it exited, even where a process it left behind holds its socket open."""
        while child in self._crew.children:
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
        self._crew.ask_back(child)
        self._crew.dismiss_if_done(child)
        self._crew.update(child)

    # -- claims ------------------------------------------------------------------------------------

    def _may_claim(self, now: float) -> bool:
        return not self._is_draining and not self._watchers_rest(now)

    def _watchers_rest(self, now: float) -> bool:
        """Whether to claim only by turns, which the server refuses if others have declared this supervisor dead."""
        return self.ledger.holds_watchers(now) or not self._lease.is_fresh()

    def _turn(self, now: float) -> None:
        """Settle and claim, if there is anything to settle, or a child that could be given something."""
        wants: list[tuple[int, int]] = []
        is_polling = self._watchers_rest(now) and now - self._polled_at >= POLL
        if not self._is_draining:
            wants = self._crew.wants(now)
        if self.ledger.is_settled and not (wants and (is_polling or not self._is_drained)):
            return
        self._polled_at = now
        self._call(functools.partial(self._claim, wants, now))

    def _claim(self, wants: list[tuple[int, int]], now: float) -> None:
        claims = self.ledger.turn(wants)
        took = time.monotonic() - now
        self._crew.round_trip += 0.1 * (min(took, 0.1) - self._crew.round_trip)
        self._is_drained = len(claims) < sum(count for _, count in wants) or (
            not wants and self._is_drained
        )
        self._distribute(claims)

    def _watch(self) -> None:
        """Have the server wait for work in the queues that nobody waits for yet."""
        for watcher, lane in zip(self._watchers, self.ledger.lanes(0), strict=True):
            if not watcher.is_waiting and time.monotonic() >= watcher.rests_until:
                watcher.ask(lane)
                self._selector.register(watcher.fd, selectors.EVENT_READ, watcher)

    def _drop_silent_watchers(self, now: float) -> None:
        for watcher in self._watchers:
            if watcher.is_waiting and now > watcher.deadline:
                self._selector.unregister(watcher.fd)
                watcher.give_up()
                self.ledger.doubt(now)

    def _answer(self, watcher: Watcher) -> None:
        self._selector.unregister(watcher.fd)
        claim = watcher.answer()
        if claim is not None:
            self._distribute([claim])

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
        known = [claim for child in self._crew.children for claim in child.assigned.values()]
        lanes = [
            lane for number in range(1, self._concurrency + 1) for lane in self.ledger.lanes(number)
        ]
        # While the server may still answer a watcher, nobody can tell a stray from a claim that is on its way.
        watched = zip(self._watchers, self.ledger.lanes(0), strict=True)
        lanes += [lane for watcher, lane in watched if not watcher.is_waiting]
        try:
            self.ledger.compare(known, lanes, now)
        except Evicted:
            logger.warning(
                "Declared dead by another supervisor, or Redis lost its data: going on under a new id"
            )
            for child in self._crew.children:
                self._crew.ask_back(child)
            self.ledger.rename(self._lease.register())

    def _distribute(self, claims: Sequence[Claim]) -> None:
        surplus = self._crew.distribute(claims)
        if surplus:  # such as an async task, where every worker runs as many as it may
            self._requeue(surplus)

    def _requeue(self, claims: Sequence[Claim]) -> None:
        # Each group goes in front of the one before.
        for settlement in reversed(grouped("requeue", claims)):
            self._settle(settlement)

    def _send(self, child: Child, frame: tuple[Any, ...]) -> None:
        if not child.channel.send(frame):
            self._watch_writable(child)
        self._replace_if_last(child)

    def _replace_if_last(self, child: Child) -> None:
        """Have the successor started when a child gets, or is left with, the last task of its life."""
        if child.has_begun_its_last():
            child.is_retiring = True
            self._tell_main(Retiring(child))

    def _watch_writable(self, child: Child) -> None:
        self._selector.modify(child.channel, selectors.EVENT_READ | selectors.EVENT_WRITE, child)
