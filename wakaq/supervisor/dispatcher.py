"""Owns every claim: which payload is in flight, and which child has it. Not for starting or killing processes.

One thread. Others post events to it; nobody else touches its state. While Redis is away, what the children report waits
here, and `Ledger` finds out afterwards what Redis has seen of it.
"""

import logging
import selectors
import threading
import time
from collections.abc import Callable
from typing import Any

from wakaq.app import WakaQ
from wakaq.broker import Broker
from wakaq.frames import Done, Failed, Outcome, Ready, Recalled
from wakaq.message import describe
from wakaq.supervisor.autopsy import grouped, running_tasks, settle
from wakaq.supervisor.child import Child
from wakaq.supervisor.claimer import POLL, Claimer
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
    Inbox,
    Joined,
    Relay,
    Retire,
    Retiring,
)
from wakaq.supervisor.lease import Lease
from wakaq.supervisor.ledger import Ledger
from wakaq.supervisor.outage import Outage
from wakaq.supervisor.watcher import Watcher, Watchers
from wakaq.turn import Settlement

logger = logging.getLogger("wakaq.supervisor")

GLANCE = 0.025  # seconds between looks for what is to be recalled


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
        self._app = app
        self._tell_main = tell_main

        # Any thread.
        self._inbox = Inbox()
        self.post = self._inbox.post

        # This thread only.
        served = [q for q in app.queues if q.name not in app.settings.exclude_queues]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._inbox, selectors.EVENT_READ)
        self._crew = Crew(app, self._send)
        self._watchers = Watchers(broker, served, self._selector)
        self.ledger = Ledger(broker, served)
        self._claimer = Claimer(self.ledger, self._crew, self._watchers, lease, outage)
        self._finish_by: float | None = None
        self._has_looked = False  # for what was claimed unseen, at the end

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
        if self._finish_by is None or not self._inbox.is_empty():
            return False
        if time.monotonic() > self._finish_by:
            return True
        if not self.ledger.is_settled or self._watchers.is_waiting:
            return False
        if not self._has_looked:
            self._has_looked = True
            self.ledger.look()
            return False
        return True

    def is_haunted(self) -> bool:
        """Whether something may yet be claimed for this supervisor, although the thread has ended."""
        return self._watchers.is_waiting or self.ledger.is_haunted(time.monotonic())

    def _step(self) -> None:
        for key, mask in self._wait():
            match key.data:
                case Child() as child:
                    self._attend(child, mask)
                case Watcher() as watcher:
                    self._claimer.hear(watcher)
                case _:  # the inbox, see below
                    pass
        for event in self._inbox.take():
            self._take(event)
        now = time.monotonic()
        self._crew.recall(now)
        self._crew.relay(now)
        self._claimer.step(now)

    def _wait(self) -> list[tuple[selectors.SelectorKey, int]]:
        """Return what is ready, the answers of watchers by the urgency of their queues."""
        ready = self._selector.select(self._patience(time.monotonic()))
        if any(self._watchers.urgency(key.data) > 0 for key, _ in ready):
            # More urgent work may have been pushed with it: what the server answered before this, is here after it.
            self._claimer.ping()
            ready = self._selector.select(0)
        return sorted(ready, key=lambda one: self._watchers.urgency(one[0].data))

    def _patience(self, now: float) -> float:
        """Return how long nothing but an event needs attention."""
        if not self._inbox.is_empty():
            return 0.0
        moments = [self._claimer.next_step_at(now), *self._crew.next_relay_at()]
        if self._crew.has_waiting():
            moments.append(now + GLANCE)
        if self._finish_by is not None:
            moments.append(now + POLL)
        return max(0.0, min(moments) - now)

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
                self._claimer.settle(Settlement(claim.lane, action, [claim.payload], new, delay))
                self._crew.give_relay(child)
            case Recalled(slots):
                self._claimer.requeue(child.recalled(slots))
            case Ready():
                child.is_ready = True
                # What came while nobody could take it is claimed by priority, not by the fastest watcher.
                self._claimer.is_drained = False
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
            self._claimer.settle(settlement)
        child.assigned.clear()
        self._tell_main(Gone(child, victims))

    # -- events from threads -----------------------------------------------------------------------

    def _take(self, event: Any) -> None:
        match event:
            case Relay(payload):
                self._crew.relay_later(payload, 0.0)
            case Drain():
                self._claimer.is_draining = True
                for child in list(self._crew.children):
                    self._retire(child)
            case Finish(deadline):
                self._finish_by = deadline
            case _:
                self._take_from_child(event, event.child)

    def _take_from_child(self, event: Any, child: Child) -> None:
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
