"""Owns every claim: which payload is in flight, and which worker has it.

One thread, to be read from top to bottom: an event comes in (a frame from a worker, a call that
another thread posted), is noted, and at the end of each step what waits is handed out and the next
turns are planned. Nothing here waits for
Redis: a `Sender` for each slot group does. While Redis is away, what workers report waits in
`InFlight`.

Not for starting or killing processes: that is the main thread's.
"""

import contextlib
import logging
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import groupby
from math import ceil
from operator import attrgetter
from typing import Any

from wakaq.app import WakaQ
from wakaq.channel import (
    Adopted,
    Assign,
    Done,
    Failed,
    Frame,
    Outcome,
    Ready,
    Recall,
    Recalled,
    Stop,
)
from wakaq.message import describe, name_of
from wakaq.queue import Queue
from wakaq.service import REGISTRY_UNUSABLE, Mailbox, Outage, crash, give_up
from wakaq.store.connection import RedisError, backoff, is_outage
from wakaq.store.registry import Registry
from wakaq.store.settlement import REQUEUE, Action, Settlement
from wakaq.store.turns import (
    Adopt,
    AdoptAnswer,
    Answer,
    Claim,
    InFlight,
    Leave,
    Registered,
    Registration,
    Request,
    Turn,
    TurnAnswer,
)
from wakaq.supervisor import prefetch
from wakaq.supervisor.child import Child, State
from wakaq.supervisor.sender import Sender
from wakaq.supervisor.waker import Idleness, Waker
from wakaq.supervisor.worker_exit import settlements
from wakaq.worker.outcome import is_suspect

logger = logging.getLogger("wakaq.supervisor")

BEAT = 1.0  # seconds between turns of an idle supervisor: others take it for dead if they stop
SETTLE_WITHIN = 0.005  # seconds until a settlement is sent that no demand takes along
RETRY_REFUSED = 1.0  # seconds between tries to settle what Redis refused
RECALL_EVERY = 0.025  # seconds between looks at what waits behind running tasks
ASKED_FOR = 0.25  # seconds in which what one group was asked for is not asked of others
# Seconds without claims in the hope of a kind, after one that nobody could take.
SURPLUS_PAUSE = 0.05
MOST_IN_TURN = 4_096  # payloads; more would keep Redis from others
EVICTED = "Declared dead by another supervisor, or Redis lost its data: going on under a new id"
MOST_EVICTIONS = 20  # in a row, after which nothing heals
MOST_ROUND_TRIP = 0.1  # seconds of a turn that count; more is an outage


class Group:
    """A slot group: what this supervisor has claimed there, and the threads that talk to it."""

    def __init__(
        self,
        app: WakaQ,
        registry: Registry,
        outage: Outage,
        answered: Callable[["Group", Request, Answer, float], None],
    ) -> None:
        broker = app.broker
        # Fixed.
        self.registry = registry
        self.sender = Sender(broker, lambda *answer: answered(self, *answer), outage, BEAT)
        self.idleness = Idleness()
        self.wakers = [
            Waker(broker, queue, self.idleness, self.sender, outage)
            for queue in registry.group.queues
        ]
        self._concurrency = app.settings.concurrency

        # Dispatcher thread only; others may read its id and turn number.
        self.inflight = InFlight(broker, registry.group)
        self.next_step: Registration | Adopt | None = None  # to be sent before any turn
        self.next_step_at = 0.0  # when it is to be sent
        self.evictions = 0  # since a turn was answered
        self.is_short = False  # the last claim left nothing in the queues
        self.has_left = False
        self.is_asked = False  # a request is on its way
        self.offered: tuple[object, ...] = ()  # what the request that waits was made of
        self.asked = 0  # how many payloads it was asked for
        # Until when that counts: a server that is away must not hold up others.
        self.asked_until = 0.0
        self.retry_at = 0.0  # when what Redis refused is to be tried again
        self.settle_at = 0.0  # when what is settled is to be sent
        self.beat_at = 0.0  # when a turn is to be made in any case

    def note_settlement(self, now: float) -> None:
        """Note that something is about to be settled."""
        if not self.inflight.to_settle:
            self.settle_at = now + SETTLE_WITHIN

    def watch(self, *, wanted: bool) -> None:
        """Have wakers wait for work while the queues are empty and there is room for it."""
        # Nobody watches the queues while nobody has room: then nothing is known of them.
        self.is_short = self.is_short and wanted
        self.idleness.has_room = wanted
        if self.is_short != self.idleness.is_idle.is_set():
            (self.idleness.is_idle.set if self.is_short else self.idleness.is_idle.clear)()

    def turn_due_at(self, *, wanted: bool) -> float:
        """Return when the next turn is to be made."""
        if wanted and not self.is_short:
            return 0.0
        return min(self.beat_at, self.settle_at) if self.inflight.to_settle else self.beat_at

    def registration(self) -> Registration:
        """Return a request for an id."""

        def make_entry(supervisor_id: str) -> dict[str, Any]:
            return self.registry.new_entry(supervisor_id, 0, self._concurrency, children=[])

        return Registration(self.registry.group, make_entry)


class Dispatcher(threading.Thread):
    """The thread; `post` is for the others.

    `tell_main` gets a child that has changed for the main thread.
    """

    def __init__(self, app: WakaQ, outage: Outage, tell_main: Callable[[Child], None]) -> None:
        super().__init__(name="wakaq-dispatcher")
        # Fixed.
        self._app = app
        self._settings = settings = app.settings
        self._tell_main = tell_main
        served = [queue for queue in app.queues if queue.name not in settings.exclude_queues]
        self.groups = [
            Group(app, Registry(app.broker, group), outage, self._post_answer)
            for group in app.broker.keys.groups(served)
        ]
        self._group_of = {
            queue: group for group in self.groups for queue in group.registry.group.queues
        }
        self._queue_index = {queue: index for index, queue in enumerate(app.queues)}
        self._async_names = frozenset(name for name, task in app.tasks.items() if task.is_async)

        # Any thread.
        self._mailbox = Mailbox()
        self.post = self._mailbox.post

        # This thread only.
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._mailbox, selectors.EVENT_READ)
        self._children: set[Child] = set()
        self._with_backlog: set[Child] = set()  # where something waits behind a running task
        self._suspects: deque[Claim] = deque()  # each waits for a worker that has nothing else
        self._broadcasts: list[tuple[float, Claim]] = []  # when each is due
        self._round_trip = 0.0  # seconds that a turn takes, on average
        self._async_expected = 1  # async payloads in a worker's next turn: twice those in the last
        # Until then nothing is claimed for workers that have room for one kind only.
        self._surplus_until = 0.0
        self._is_draining = False
        self._finish_by: float | None = None

    # -- the loop ----------------------------------------------------------------------------------

    def register(self) -> None:
        """Register in each slot group, before there are other threads (main thread).

        Raises:
            redis.RedisError: Redis cannot be reached.
        """
        for group in self.groups:
            registration = group.registration()
            try:
                while (registered := registration.send(self._app.broker)) is None:
                    pass
            except RedisError as error:
                if is_outage(error):
                    raise
                give_up(registration.describe_refusal(error), REGISTRY_UNUSABLE)
            group.inflight.begin(registered)

    @property
    def wakers(self) -> list[Waker]:
        """The threads that wait for work (any thread)."""
        return [waker for group in self.groups for waker in group.wakers]

    def run(self) -> None:
        try:
            for group in self.groups:
                for thread in (group.sender, *group.wakers):
                    thread.start()
            while not self._is_finished():
                self._step()
            for group in self.groups:
                group.sender.stop()
        except BaseException:  # noqa: BLE001 - whatever it is
            crash("The dispatcher")
        self._selector.close()

    def _is_finished(self) -> bool:
        if self._finish_by is None:
            return False
        return time.monotonic() > self._finish_by or all(group.has_left for group in self.groups)

    def _step(self) -> None:
        for key, mask in self._selector.select(self._wait(time.monotonic())):
            if isinstance(key.data, Child):
                self._attend(key.data, mask)
        self._mailbox.work()
        now = time.monotonic()
        self._recall(now)
        self._start_suspects()
        self._start_broadcasts(now)
        for group in self.groups:
            self._plan_turn(group, now)

    def _wait(self, now: float) -> float:
        """Return how long nothing but an event needs attention."""
        if not self._mailbox.is_empty():
            return 0.0
        moments = [now + BEAT, *(due for due, _ in self._broadcasts if due > now)]
        if now < self._surplus_until:
            moments.append(self._surplus_until)
        if self._with_backlog:
            moments.append(now + RECALL_EVERY)
        if self._finish_by is not None:
            moments.append(self._finish_by)
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

    def _hear(self, child: Child) -> None:
        """Take the frames that have arrived."""
        for frame in child.channel.receive():
            self._take(child, frame)
        self._update(child)

    def _take(self, child: Child, frame: Frame) -> None:
        match frame:
            case Done(rows, timed, busy):
                if timed:
                    prefetch.observe(child, timed, busy)
                self._acknowledge(child.release(rows))
                self._give_broadcast(child, is_free=timed > 0)
            case Outcome(row):
                was_sync = row not in child.async_rows
                (claim,) = child.release([row])
                self._settle(claim, frame.settlement)
                self._give_broadcast(child, is_free=was_sync)
            case Recalled(rows):
                child.is_recalling = False
                self._requeue(child.take_back(rows))
            case Ready():
                child.serve()
                self._tell_main(child)
            case Failed(reason):
                child.boot_failure = reason  # main learns it with the end of the process
            case _:
                raise AssertionError(frame)

    def _update(self, child: Child) -> None:
        """See what follows for a child from what it has now."""
        has_backlog = child.sync_count > 1
        (self._with_backlog.add if has_backlog else self._with_backlog.discard)(child)
        if child.assigned:
            return
        child.runs_suspect = False
        is_done = child.state is State.RETIRING or (
            child.state is State.SERVING and child.left == 0 and not child.is_recalling
        )
        if is_done:
            child.state, child.stopped_at = State.STOPPING, time.monotonic()
            self._send(child, Stop())

    def _lose(self, child: Child) -> None:
        """Settle what a worker had that is gone; all it had sent before was heard."""
        self._children.discard(child)
        self._with_backlog.discard(child)
        self._selector.unregister(child.channel)
        child.was_running = child.describe_running()
        name = f"{self._supervisor_id} worker {child.slot}"
        for claim, settlement in settlements(child, self._settings.max_redeliveries, name):
            self._settle(claim, settlement)
        child.assigned.clear()
        child.state = State.GONE
        self._tell_main(child)

    @property
    def _supervisor_id(self) -> str:
        return self.groups[0].inflight.supervisor_id

    # -- settlements -------------------------------------------------------------------------------

    def _acknowledge(self, claims: Sequence[Claim]) -> None:
        for queue, of_queue in groupby(claims, key=attrgetter("queue")):
            if queue is not None:  # a broadcast is in no hash
                group = self._group_of[queue]
                group.note_settlement(time.monotonic())
                group.inflight.acknowledge(of_queue)

    def _settle(self, claim: Claim, settlement: Settlement) -> None:
        if claim.queue is None:
            self._settle_broadcast(claim, settlement)
            return
        group = self._group_of[claim.queue]
        group.note_settlement(time.monotonic())
        group.inflight.settle(claim, settlement)

    def _requeue(self, claims: Sequence[Claim]) -> None:
        """Put claims back to the front of their queues, where a turn keeps their order."""
        for claim in claims:
            self._settle(claim, REQUEUE)

    def _settle_broadcast(self, claim: Claim, settlement: Settlement) -> None:
        """Do with a broadcast what Redis would do with a payload: have it run again, or not."""
        match settlement.action:
            case Action.ACK:
                pass
            case Action.DEAD:
                call = describe(claim.payload)
                logger.error("Broadcast %s is given up, and leaves no dead letter", call)
            case _:
                again = Claim(None, settlement.payload or claim.payload)
                self._broadcasts.append((time.monotonic() + settlement.delay, again))

    # -- handing out -------------------------------------------------------------------------------

    def _hand_out(self, claims: Sequence[Claim]) -> None:
        """Give each claim to a worker; those that nobody can take go back."""
        if self._is_draining:
            self._requeue(claims)
            return
        now = time.monotonic()
        kinds: dict[str, list[Claim]] = {"sync": [], "async": []}
        for claim in claims:
            if is_suspect(claim.payload):
                self._suspects.append(claim)
            else:
                kinds["async" if self._is_async(claim) else "sync"].append(claim)
        surplus = self._share(kinds["sync"], now, is_async=False)
        surplus += self._share(kinds["async"], now, is_async=True)
        if self._async_names and claims:
            self._async_expected = min(max(1, 2 * len(kinds["async"])), prefetch.MOST_AHEAD)
            if surplus:
                self._surplus_until = now + SURPLUS_PAUSE
        self._requeue(surplus)

    def _share(self, claims: list[Claim], now: float, *, is_async: bool) -> list[Claim]:
        """Spread claims of one kind over the workers, to those with least to do first.

        Return what is left over.
        """
        while claims:
            rooms = [
                (self._room_of_kind(child, now, is_async=is_async), child)
                for child in self._children
            ]
            takers = [(room, child) for room, child in rooms if room]
            if not takers:
                break
            takers.sort(key=lambda taker: len(taker[1].assigned))
            # A run without gaps for each, so that its acks are ranges.
            share = ceil(len(claims) / len(takers))
            for room, child in takers:
                given, claims = claims[: min(share, room)], claims[min(share, room) :]
                if given:
                    self._assign(child, given, is_async=is_async)
        return claims

    def _room_of_kind(self, child: Child, now: float, *, is_async: bool) -> int:
        if is_async:
            return prefetch.async_room(child, self._settings.async_concurrency)
        return prefetch.sync_room(child, now, self._round_trip)

    def _assign(
        self, child: Child, claims: list[Claim], *, is_async: bool, is_urgent: bool = False
    ) -> None:
        if not is_async:
            prefetch.widen(child, len(claims))
        rows, start = child.assign(claims, is_async=is_async), 0
        for queue, of_queue in groupby(claims, key=attrgetter("queue")):
            part = list(of_queue)
            frame = self._assignment(
                queue, part, rows[start : start + len(part)], is_urgent=is_urgent
            )
            self._send(child, frame)
            start += len(part)
        self._update(child)

    def _assignment(
        self, queue: Queue | None, claims: list[Claim], rows: list[int], *, is_urgent: bool
    ) -> Assign:
        numbers = [claim.number for claim in claims]
        payloads = [claim.payload for claim in claims]
        if queue is None:
            return Assign("", -1, rows, numbers, payloads, is_urgent)
        supervisor_id = self._group_of[queue].inflight.supervisor_id
        return Assign(supervisor_id, self._queue_index[queue], rows, numbers, payloads, is_urgent)

    def _is_async(self, claim: Claim) -> bool:
        return bool(self._async_names) and name_of(claim.payload) in self._async_names

    def _recall(self, now: float) -> None:
        """Ask back what waits too long behind other tasks, for whoever is free."""
        for child in self._with_backlog:
            if prefetch.has_too_much(child, now, self._round_trip):
                self._recall_from(child)

    def _recall_from(self, child: Child) -> None:
        if not child.is_recalling:
            child.is_recalling = True
            self._send(child, Recall())

    def _send(self, child: Child, frame: Frame) -> None:
        if not child.channel.send(frame):
            self.flush_later(child)

    # -- suspects: what has taken down a worker or a machine runs alone ----------------------------

    def _start_suspects(self) -> None:
        """Give each suspect a worker that has nothing else: the next death names the culprit."""
        for child in self._children:
            child.is_reserved = False  # which is decided anew in each step
        if not self._suspects:
            return
        now = time.monotonic()
        serving = [
            child for child in self._children if child.state is State.SERVING and child.left != 0
        ]
        for child in serving:
            if self._suspects and not child.assigned:
                child.runs_suspect, child.window = True, 1
                claim = self._suspects.popleft()
                self._assign(child, [claim], is_async=self._is_async(claim))
        # The others wait for those that will be empty soonest.
        busy = sorted(
            filter(prefetch.takes_work, serving),
            key=lambda child: (prefetch.is_blocked(child, now), len(child.assigned)),
        )
        for child in busy[: len(self._suspects)]:
            child.is_reserved = True
            self._recall_from(child)
        # More than there are workers: others may have some that are free. Broadcasts are for us.
        kept: deque[Claim] = deque()
        surplus: list[Claim] = []
        for claim in self._suspects:
            is_kept = claim.queue is None or len(kept) < len(serving)
            (kept if is_kept else surplus).append(claim)
        self._suspects = kept
        self._requeue(surplus)

    # -- broadcasts --------------------------------------------------------------------------------

    def _start_broadcasts(self, now: float) -> None:
        """Have broadcasts run by whoever is free.

        Where nobody is, they wait for the first that will be.
        """
        if any(due <= now for due, _ in self._broadcasts):
            for child in sorted(self._children, key=attrgetter("sync_count")):
                while self._give_broadcast(child, is_free=prefetch.is_idle(child)):
                    pass

    def _give_broadcast(self, child: Child, *, is_free: bool) -> bool:
        """Let a worker that is free, or just was, run a broadcast next.

        No other will be free sooner.
        """
        now = time.monotonic()
        for broadcast in self._broadcasts:
            due, claim = broadcast
            if due > now:
                continue
            if is_suspect(claim.payload):
                self._broadcasts.remove(broadcast)
                self._suspects.append(claim)
                return True
            is_async = self._is_async(claim)
            room = self._room_of_kind(child, now, is_async=True) if is_async else is_free
            if room and prefetch.takes_work(child):
                self._broadcasts.remove(broadcast)
                self._assign(child, [claim], is_async=is_async, is_urgent=True)
                return True
        return False

    # -- turns -------------------------------------------------------------------------------------

    def _plan_turn(self, group: Group, now: float) -> None:
        """Offer the group's sender what is to be asked next, if that has changed."""
        if group.has_left or group.is_asked or not group.sender.is_open:
            return
        if now >= group.retry_at:
            group.inflight.retry_refused()
            group.retry_at = now + RETRY_REFUSED
        step: Request | None = group.next_step
        if step is None and self._finish_by is not None and group.inflight.is_settled:
            step = group.inflight.leave()
        if step is not None:
            group.is_asked = group.sender.offer(step, group.next_step_at)
            return
        wanted = self._demand(group, now)
        group.watch(wanted=bool(wanted))
        send_at = group.turn_due_at(wanted=bool(wanted))
        made_of = (group.inflight.to_settle, wanted, send_at)
        if made_of != group.offered and group.sender.offer(group.inflight.turn(wanted), send_at):
            group.offered = made_of
            # One that is due is as good as sent: what workers report meanwhile waits for the next.
            group.is_asked = send_at <= now
            if group.is_asked:
                group.asked, group.asked_until = wanted, now + ASKED_FOR

    def _demand(self, group: Group, now: float) -> int:
        """Return how many payloads workers can take now, besides what was asked of other groups."""
        if self._is_draining:
            return 0
        rooms = sum(self._room(child, now) for child in self._children)
        others = [other for other in self.groups if other is not group and now < other.asked_until]
        asked = sum(other.asked for other in others)
        return max(0, min(rooms - asked, MOST_IN_TURN))

    def _room(self, child: Child, now: float) -> int:
        """Return how many payloads of unknown kinds to claim for a child."""
        sync_room = prefetch.sync_room(child, now, self._round_trip)
        if not self._async_names:
            return sync_room
        limit = self._settings.async_concurrency
        async_room = min(prefetch.async_room(child, limit), self._async_expected)
        if sync_room and async_room:
            return max(sync_room, async_room)
        # Whoever could take one kind only may get the other, which then goes back.
        if now < self._surplus_until:
            return 0
        return sync_room or (async_room if prefetch.is_blocked(child, now) else 0)

    def _post_answer(self, group: Group, request: Request, answer: Answer, took: float) -> None:
        """Take an answer in from a sender (its thread)."""
        self.post(self._take_answer, group, request, answer, took)

    def _take_answer(self, group: Group, request: Request, answer: Answer, took: float) -> None:
        group.sender.take_note()
        group.offered, group.is_asked, group.asked = (), False, 0
        group.next_step = None
        now = time.monotonic()
        group.beat_at, group.settle_at = now + BEAT, now + SETTLE_WITHIN
        match request, answer:
            case Turn(), TurnAnswer():
                group.evictions = 0
                self._round_trip += 0.1 * (min(took, MOST_ROUND_TRIP) - self._round_trip)
                claims = group.inflight.answered(request, answer)
                if request.wanted:
                    group.is_short = len(claims) < request.wanted
                self._hand_out(claims)
            case Adopt(), AdoptAnswer():
                group.inflight.adopted(request, answer)
                self._tell_adopted(group)
            case Registration(), Registered():
                group.inflight.begin(answer)
                group.next_step = group.inflight.adopt(takes_rest=True)
            case Leave(), bool():
                group.has_left = True
                if not answer:
                    logger.warning("Something is left in flight: others will take care of it")
            case _:
                if not isinstance(request, Registration):
                    self._note_eviction(group, now)
                group.next_step = group.registration()

    def _note_eviction(self, group: Group, now: float) -> None:
        logger.warning(EVICTED)
        # The first time at once; a server that evicts again and again is asked ever more slowly.
        group.next_step_at = now + backoff(group.evictions) if group.evictions else now
        group.evictions += 1
        if group.evictions > MOST_EVICTIONS:
            give_up("Redis answers no turn of this supervisor", REGISTRY_UNUSABLE)

    def _tell_adopted(self, group: Group) -> None:
        """Tell workers under which id and numbers to look, should this supervisor die."""
        # What waits here and was not found is somebody else's.
        self._suspects = deque(one for one in self._suspects if one.queue is None or one.number)
        for child in self._children:
            rows = [
                row
                for row, claim in child.assigned.items()
                if claim.queue is not None and self._group_of[claim.queue] is group
            ]
            if rows:
                numbers = [child.assigned[row].number for row in rows]
                self._send(child, Adopted(group.inflight.supervisor_id, rows, numbers))
                if not all(numbers):  # what it has not started is somebody else's
                    self._recall_from(child)

    # -- events: posted by other threads -----------------------------------------------------------

    def join_child(self, child: Child) -> None:
        """Take a worker in that was spawned."""
        child.left = self._settings.max_tasks_per_worker
        self._children.add(child)
        self._selector.register(child.channel, selectors.EVENT_READ, child)
        if self._is_draining:
            self.retire_child(child)

    def end_child(self, child: Child) -> None:
        """Hear what a worker had sent before it ended.

        A process that it left behind may hold its channel open.
        """
        if child in self._children:
            with contextlib.suppress(EOFError):
                while child.channel.is_readable():
                    self._hear(child)
            self._lose(child)

    def retire_child(self, child: Child) -> None:
        """Have a worker exit after what it runs now."""
        if child in self._children and child.state in {State.STARTING, State.SERVING}:
            child.state = State.RETIRING
            self._recall_from(child)
            self._update(child)

    def flush_later(self, child: Child) -> None:
        """Send the rest of a frame as soon as the child's channel takes it."""
        if child in self._children:
            events = selectors.EVENT_READ | selectors.EVENT_WRITE
            self._selector.modify(child.channel, events, child)

    def broadcast(self, payload: bytes) -> None:
        """Have a broadcast run in one of the workers."""
        self._broadcasts.append((0.0, Claim(None, payload)))

    def drain(self) -> None:
        """Claim nothing any more, let run what runs, and have every worker exit."""
        self._is_draining = True
        for waker in self.wakers:
            waker.stop()
        self._requeue([claim for claim in self._suspects if claim.queue is not None])
        self._suspects.clear()
        for child in list(self._children):
            self.retire_child(child)

    def finish(self, deadline: float) -> None:
        """Settle the rest, all workers being gone, by the deadline, and end."""
        self._finish_by = deadline
