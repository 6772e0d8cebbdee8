"""Owns every claim: which payload is in flight, and which child has it. Not for starting or killing processes.

One thread. Others post calls to its mailbox; nobody else touches its state. While Redis is away, what the children report
waits here, and `Ledger` finds out afterwards what Redis has seen of it.
"""

import selectors
import threading
import time
from collections.abc import Callable
from typing import Any

from wakaq.app import WakaQ
from wakaq.broker import Broker
from wakaq.frames import Done, Failed, Outcome, Ready, Recalled
from wakaq.supervisor.autopsy import settle
from wakaq.supervisor.child import Child
from wakaq.supervisor.claimer import Claimer
from wakaq.supervisor.crew import Crew
from wakaq.supervisor.lease import Lease
from wakaq.supervisor.ledger import Ledger
from wakaq.supervisor.service import Mailbox, Outage, crash
from wakaq.supervisor.watcher import Watcher, Watchers
from wakaq.turn import Settlement

GLANCE = 0.025  # seconds between looks for what is to be recalled
LOOK = 1.0  # seconds between looks at watchers that get no answer


class Dispatcher(threading.Thread):
    """The thread; `post` is for the others. `tell_main` gets a child that has changed for the main thread."""

    def __init__(
        self,
        app: WakaQ,
        broker: Broker,
        outage: Outage,
        lease: Lease,
        tell_main: Callable[[Child], None],
    ) -> None:
        super().__init__(name="wakaq-dispatcher")
        # Fixed.
        self._settings = app.settings
        self._tell_main = tell_main

        # Any thread.
        self._mailbox = Mailbox()
        self.post = self._mailbox.post

        # This thread only.
        served = [q for q in app.queues if q.name not in app.settings.exclude_queues]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._mailbox, selectors.EVENT_READ)
        self._crew = Crew(app, self._send)
        watchers = Watchers(broker, served, self._selector)
        self.claimer = Claimer(broker, Ledger(broker, served), self._crew, watchers, lease, outage)
        self._finish_by: float | None = None

    # -- the loop ----------------------------------------------------------------------------------

    def run(self) -> None:
        try:
            while not self._is_finished():
                self._step()
        except BaseException:  # noqa: BLE001 - whatever it is
            crash("The dispatcher")
        self._selector.close()

    def _is_finished(self) -> bool:
        if self._finish_by is None or not self._mailbox.is_empty():
            return False
        return time.monotonic() > self._finish_by or self.claimer.is_settled()

    def _step(self) -> None:
        for key, mask in self._wait():
            if isinstance(key.data, Child):
                self._attend(key.data, mask)
            elif isinstance(key.data, Watcher):
                self.claimer.hear(key.data)
        self._mailbox.work()
        now = time.monotonic()
        self._crew.recall(now)
        self._crew.relay(now)
        self._crew.anticipate(now)
        self.claimer.step(now)

    def _wait(self) -> list[tuple[selectors.SelectorKey, int]]:
        """Return what is ready, the answers of watchers by the urgency of their queues."""
        ready = self._selector.select(self._patience(time.monotonic()))
        if len(ready) > 1 or (ready and _urgency(ready[0]) > 0):
            if any(_urgency(one) > 0 for one in ready):
                # More urgent work may have been pushed with it: what the server answered before this, is here after it.
                self.claimer.ping()
                ready = self._selector.select(0)
            ready.sort(key=_urgency)
        return ready

    def _patience(self, now: float) -> float:
        """Return how long nothing but an event needs attention."""
        if not self._mailbox.is_empty():
            return 0.0
        moments = [now + LOOK, self.claimer.next_step_at(now), *self._crew.next_moments(now)]
        if self._crew.has_waiting() or self._finish_by is not None:
            moments.append(now + GLANCE)
        return max(0.0, min(moments) - now)

    # -- frames from children ----------------------------------------------------------------------

    def _attend(self, child: Child, mask: int) -> None:
        if mask & selectors.EVENT_WRITE and child.channel.flush():
            self._selector.modify(child.channel, selectors.EVENT_READ, child)
        if mask & selectors.EVENT_READ:
            try:
                self._hear(child)
            except EOFError:
                self._lose(child)

    def _hear(self, child: Child) -> bool:
        """Take the frames that have arrived; returns whether there were any."""
        frames = child.channel.receive()
        for frame in frames:
            self._take(child, frame)
        self._replace_if_last(child)
        self._crew.dismiss_if_done(child)
        self._crew.update(child)
        return bool(frames)

    def _take(self, child: Child, frame: Any) -> None:
        match frame:
            case Done(slots, timed, busy):
                if timed:
                    child.observe(timed, busy)
                self.claimer.ack(child, child.take_back(slots))
                self._crew.give_relay(child, time.monotonic())
            case Outcome(slot, action, new, delay):
                (claim,) = child.take_back([slot])
                self.claimer.settle(Settlement(claim.lane, action, [claim.payload], new, delay))
                self._crew.give_relay(child, time.monotonic())
            case Recalled(slots):
                self.claimer.requeue(child.recalled(slots))
            case Ready():
                child.is_ready = True
                # What came while nobody could take it is claimed by priority, not by the fastest watcher.
                self.claimer.is_drained = False
                self._tell_main(child)
            case Failed(reason):
                child.boot_failure = reason  # main learns it with the end of the process
            case _:
                raise AssertionError(frame)

    def _lose(self, child: Child) -> None:
        """Settle what a worker had that is gone; all it had sent before was heard."""
        self._crew.leave(child)
        self._selector.unregister(child.channel)
        child.victims = child.describe_running()
        for one in settle(child, self._settings.max_redeliveries, self.claimer.ledger.worker_id):
            self.claimer.settle(one)
        child.assigned.clear()
        child.is_gone = True
        self._tell_main(child)

    # -- events: posted by other threads -----------------------------------------------------------

    def join_child(self, child: Child) -> None:
        """Take a worker in that was spawned."""
        child.left = self._settings.max_tasks_per_worker
        self._crew.join(child)
        self._selector.register(child.channel, selectors.EVENT_READ, child)

    def end_child(self, child: Child) -> None:
        """Hear what a worker had sent before it exited, even where a process it left behind holds its socket open."""
        if child in self._crew.children:
            try:
                while self._hear(child):
                    pass
            except EOFError:
                pass
            self._lose(child)

    def retire_child(self, child: Child) -> None:
        """Have a worker exit after what it runs now."""
        if child in self._crew.children:
            child.is_retiring = True
            self._crew.ask_back(child)
            self._crew.dismiss_if_done(child)
            self._crew.update(child)

    def flush_later(self, child: Child) -> None:
        """Send the rest of a frame as soon as the child's socket takes it."""
        if child in self._crew.children:
            events = selectors.EVENT_READ | selectors.EVENT_WRITE
            self._selector.modify(child.channel, events, child)

    def relay(self, payload: bytes) -> None:
        """Have a broadcast run in one of the workers."""
        self._crew.relay_later(payload)

    def drain(self) -> None:
        """Claim nothing any more, let run what runs, and have every worker exit."""
        self.claimer.is_draining = True
        for child in list(self._crew.children):
            self.retire_child(child)

    def finish(self, deadline: float) -> None:
        """Settle the rest, all workers being gone, by the deadline, and end."""
        self._finish_by = deadline

    # -- to children -------------------------------------------------------------------------------

    def _send(self, child: Child, frame: tuple[Any, ...]) -> None:
        if not child.channel.send(frame):
            self.flush_later(child)
        self._replace_if_last(child)

    def _replace_if_last(self, child: Child) -> None:
        """Have the successor started when a child gets, or is left with, the last task of its life."""
        if child.has_begun_its_last():
            child.is_retiring = child.needs_successor = True
            self._tell_main(child)


def _urgency(ready: tuple[selectors.SelectorKey, int]) -> int:
    """Return the place of a watcher's queue in the order of priority; anything else comes first."""
    data = ready[0].data
    return data.urgency if isinstance(data, Watcher) else -1
