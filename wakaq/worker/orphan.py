"""Takes the supervisor's place for one worker whose supervisor has died.

What runs here is run to its end, settled, and started by nobody else; what has not begun is handed
back. So others can rescue the rest of what the supervisor had at once. Not for noticing that it is
gone: that is `control`. Nothing new is claimed here.

Time limits hold whatever Redis does, so they and Redis have a thread each:

=============  =========  ==========================================================================
thread         class      what it does
=============  =========  ==========================================================================
wakaq-control  `Orphan`   hears from the other threads what became of tasks, and enforces their
                          limits; waits neither for Redis nor for a log
wakaq-settler  `Settler`  registers, adopts what this process holds, settles it, beats and leaves;
                          one for each slot group, so that none waits for another's server
=============  =========  ==========================================================================

What had been reported to the supervisor is not touched. Whether it has settled that, nobody here
knows: if not, it is rescued, and run again.
"""

import faulthandler
import logging
import math
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from wakaq.channel import Done, Frame, Outcome
from wakaq.message import describe
from wakaq.progress import FINISHED
from wakaq.store.broker import Broker
from wakaq.store.connection import RedisError
from wakaq.store.keys import SlotGroup
from wakaq.store.registry import Registry
from wakaq.store.settlement import ACK, REQUEUE, Settlement
from wakaq.store.turns import (
    AdoptAnswer,
    Answer,
    Claim,
    InFlight,
    Refused,
    Registered,
    Registration,
    Request,
    TurnAnswer,
    exchange,
)
from wakaq.worker.assignments import Assignments, Item
from wakaq.worker.outcome import hard_timeout

logger = logging.getLogger("wakaq.worker")

BEAT = 1.0  # seconds, at most, between turns
LOOK_EVERY = 0.05  # seconds between looks at the limits of what is running
KILL_DELAY = 0.5  # seconds, at most, to settle a task past its hard timeout before it is killed
GIVE_UP_AFTER = 600.0  # seconds to go on trying to settle once nothing runs
MOST_EVICTIONS = 3  # in a row
STACKS = 64_000  # bytes of stacks that are read


class Orphan:
    """Runs in the control thread, from the supervisor's death to the end of the last task."""

    def __init__(self, assignments: Assignments, stacks_fd: int) -> None:
        self._assignments = assignments
        self._progress = assignments.progress
        self._stacks_fd = stacks_fd
        self._reports: SimpleQueue[Frame] = SimpleQueue()
        # Row -> payload of what is still to be reported, running or finished.
        self._running: dict[int, bytes] = {}
        # Row -> what Redis has of it, and who settles that. A broadcast is in no hash.
        self._claims: dict[int, tuple[Settler, Claim]] = {}
        self._settlers: list[Settler] = []

    def run(self) -> None:
        """Finish what runs; returns when all of it is settled."""
        assignments = self._assignments
        assignments.report = self._reports.put
        assignments.is_stopping = True
        unstarted = assignments.take_back()
        # What is known now will be reported to us.
        running = list(assignments.items.copy().values())
        self._running = {item.row: item.payload for item in running}
        _log(logging.WARNING, "The supervisor is gone: ending after %d running tasks", len(running))
        self._start_settlers(unstarted + running)
        for item in reversed(unstarted):  # each goes in front of the one before
            self._settle(item.row, REQUEUE)
        while self._running:
            self._hear()
            self._enforce_limits(time.monotonic())
        self._finish(math.inf)

    def _start_settlers(self, items: Iterable[Item]) -> None:
        app = self._assignments.app
        broker = app.broker
        groups = {queue: group for group in broker.groups for queue in group.queues}
        held: dict[tuple[SlotGroup, str], dict[int, Claim]] = defaultdict(dict)
        for item in items:
            if item.number:
                queue = app.queues[item.queue]
                claim = Claim(queue, item.payload, item.number)
                held[groups[queue], item.supervisor_id][item.row] = claim
        for (group, supervisor_id), claims in held.items():
            settler = Settler(broker, group, supervisor_id, claims.values())
            settler.start()
            self._settlers.append(settler)
            self._claims |= {row: (settler, claim) for row, claim in claims.items()}

    def _hear(self) -> None:
        with suppress(Empty):
            match self._reports.get(timeout=LOOK_EVERY):
                case Done(rows):
                    for row in rows:
                        self._settle(row, ACK)
                case Outcome() as outcome:
                    self._settle(outcome.row, outcome.settlement)
                case _:  # nothing else is reported of a task
                    raise AssertionError

    def _settle(self, row: int, settlement: Settlement) -> None:
        self._running.pop(row, None)
        if row in self._claims:
            settler, claim = self._claims.pop(row)
            settler.settle(claim, settlement)

    def _enforce_limits(self, now: float) -> None:
        """Do what the supervisor's timeouts thread did."""
        progress = self._progress
        if 0.0 < progress.soft_deadline <= now:
            # The handler looks at the deadline again, so a signal that comes late hits nothing.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)
        for row, payload in list(self._running.items()):
            if 0.0 < progress.hard_deadlines[row] <= now:
                stacks = self._stacks()
                if progress.hard_deadlines[row]:  # it has not ended just now
                    self._kill(row, payload, stacks)

    def _kill(self, overdue: int, payload: bytes, stacks: str) -> None:
        """Kill this process and what its tasks have started, for a task past its hard timeout.

        If Redis is away, so that nothing can be settled in time, all that ran here is rescued.
        """
        deadline = time.monotonic() + KILL_DELAY
        text = "%s ran into its hard timeout, and its worker ends. It was at:\n%s"
        log = _log(logging.ERROR, text, describe(payload), stacks)
        self._settle(overdue, hard_timeout(payload, stacks, self._assignments.worker))
        for row in list(self._running):
            # What has not returned shared its worker with the task that is meant.
            is_finished = self._progress.states[row] == FINISHED
            self._settle(row, ACK if is_finished else REQUEUE)
        self._finish(deadline)
        log.join(max(0.0, deadline - time.monotonic()))
        os.killpg(os.getpgrp(), signal.SIGKILL)

    def _stacks(self) -> str:
        try:
            os.ftruncate(self._stacks_fd, 0)
            faulthandler.dump_traceback(self._stacks_fd, all_threads=True)
            return os.pread(self._stacks_fd, STACKS, 0).decode(errors="replace")
        except OSError as error:  # such as a full disk, or a task that closes descriptors
            return f"unknown: {error}"

    def _finish(self, deadline: float) -> None:
        """Wait until all is settled, until the deadline at most."""
        for settler in self._settlers:
            settler.finish()
        for settler in self._settlers:
            settler.join(max(0.0, min(deadline - time.monotonic(), threading.TIMEOUT_MAX)))


class GaveUp(Exception):
    """What this process holds cannot be settled, and is left to be rescued."""


class Settler(threading.Thread):
    """Settles what this process holds of one slot group, under an id of its own.

    ===========  ====================================  =============================================
    state        it sends                              next
    ===========  ====================================  =============================================
    registering  `Registration`, with a new random id  adopting
    adopting     the id's first turn                   serving; if evicted: registering
    serving      a turn with what was decided; an      leaving, once all is decided and settled;
                 empty one if nothing was for `BEAT`   if evicted: registering
    leaving      the last turn                         ended
    ===========  ====================================  =============================================

    It ends in any state if Redis goes on refusing, or stays away for long after nothing runs.
    """

    def __init__(
        self, broker: Broker, group: SlotGroup, supervisor_id: str, claims: Iterable[Claim]
    ) -> None:
        super().__init__(name="wakaq-settler", daemon=True)
        # Fixed.
        self._broker = broker
        self._group = group
        self._registry = Registry(broker, group)

        # Any thread; None: there are no more.
        self._decisions: SimpleQueue[tuple[Claim, Settlement] | None] = SimpleQueue()

        # Written by the control thread, once.
        self._give_up_at = math.inf

        # This thread only.
        self._inflight = InFlight(broker, group)
        self._inflight.adopts_from(supervisor_id, claims)
        self._has_adopted = False
        self._evictions = 0  # since the last turn that was answered
        self._is_finishing = False
        self._is_away = False  # Redis

    # -- for the control thread --------------------------------------------------------------------

    def settle(self, claim: Claim, settlement: Settlement) -> None:
        """Have a decision made true."""
        self._decisions.put((claim, settlement))

    def finish(self) -> None:
        """End, once all that was decided is settled."""
        self._give_up_at = time.monotonic() + GIVE_UP_AFTER
        self._decisions.put(None)

    # -- the thread --------------------------------------------------------------------------------

    def run(self) -> None:
        try:
            self._register()
            while not self._is_over():
                self._hear()
                self._turn()
            if not self._exchange(self._inflight.leave()):
                logger.error("Redis refuses to settle %s", self._held())
        except (GaveUp, Refused) as error:
            logger.error("%s: leaving %s to be rescued", error, self._held())  # noqa: TRY400 - no bug

    def _held(self) -> str:
        calls = ", ".join(describe(claim.payload) for claim in self._inflight.claims.values())
        return calls or "nothing"

    def _is_over(self) -> bool:
        # What Redis has refused to settle, it goes on refusing.
        inflight = self._inflight
        return self._is_finishing and len(inflight.claims) == len(inflight.refused)

    def _register(self) -> None:
        """Go on under a new id, and adopt what is held under the one before."""
        inflight = self._inflight
        while True:
            registered = self._exchange(Registration(self._group, self._make_entry, "orphan"))
            if not isinstance(registered, Registered):  # the id is taken
                continue
            inflight.begin(registered)
            # The dead supervisor had other workers, which adopt what they hold; but our former ids
            # were ours alone.
            adopt = inflight.adopt(takes_rest=self._has_adopted)
            assert adopt is not None
            answer = self._exchange(adopt)
            if isinstance(answer, AdoptAnswer):
                inflight.adopted(adopt, answer)
                self._has_adopted = True
                return
            self._note_eviction()

    def _hear(self) -> None:
        """Take in what was decided; wait for it as long as the lease allows."""
        with suppress(Empty):
            decision = self._decisions.get(timeout=BEAT)
            while True:
                if decision is None:
                    self._is_finishing = True
                else:
                    self._inflight.settle(*decision)
                decision = self._decisions.get_nowait()

    def _turn(self) -> None:
        inflight = self._inflight
        inflight.retry_refused()
        turn = inflight.turn(wanted=0)
        answer = self._exchange(turn)
        if isinstance(answer, TurnAnswer):
            inflight.answered(turn, answer)
            self._evictions = 0
            with suppress(RedisError):  # the next turn will tell
                supervisor_id = inflight.supervisor_id
                self._registry.beat(supervisor_id, self._make_entry(supervisor_id))
        else:
            self._note_eviction()
            self._register()

    def _note_eviction(self) -> None:
        self._evictions += 1
        if self._evictions == MOST_EVICTIONS:
            raise GaveUp("Redis refuses every turn")

    # -- requests ----------------------------------------------------------------------------------

    def _exchange(self, request: Request) -> Answer:
        answer = exchange(request, self._broker, self._pause, self._note_outage)
        if answer is None and time.monotonic() >= self._give_up_at:
            raise GaveUp("Redis is still away")
        if self._is_away:
            self._is_away = False
            logger.info("Redis is back")
        return answer

    def _pause(self, seconds: float) -> bool:
        time.sleep(seconds)
        return time.monotonic() >= self._give_up_at

    def _note_outage(self, error: Exception) -> None:
        if not self._is_away:
            self._is_away = True
            logger.warning("Redis is away: %s", error)

    def _make_entry(self, supervisor_id: str) -> dict[str, Any]:
        return self._registry.new_entry(supervisor_id, self._inflight.turn_number, concurrency=1)


def _log(level: int, text: str, *args: object) -> threading.Thread:
    """Log in a thread of its own: a log that nobody reads can block, and limits must not wait."""
    thread = threading.Thread(
        target=logger.log, args=(level, text, *args), name="wakaq-log", daemon=True
    )
    thread.start()
    return thread
