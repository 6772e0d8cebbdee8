"""Workers of one number that follow each other: never two of them run sync tasks, and never does work wait for nobody.

The dispatcher's own methods, on frames that were really sent; the main thread and the workers are played by the tests.
"""

import os
import random
import selectors
from types import SimpleNamespace

import pytest

from wakaq import WakaQ
from wakaq.broker import Broker
from wakaq.frames import STARTED, Assign, Done, Ready, Recall, Recalled, Stop
from wakaq.supervisor.dispatcher import Dispatcher
from wakaq.service import Outage
from wakaq.turn import Claim

NEVER = float("inf")  # a moment at which everything is due
SYNC, ASYNC = b'{"name": "sync"}', b'{"name": "coroutine"}'


class Stage:
    """A dispatcher without its thread, and with no Redis; `changed` are the children that main was told of."""

    def __init__(self, make_child, **options):
        app = WakaQ(queues=[(0, "high"), (1, "low")], **options)

        @app.task
        def sync(): ...

        @app.task
        async def coroutine(): ...

        self.make_child = make_child
        self.changed = []
        lease = SimpleNamespace(lost=None, is_fresh=lambda: True)
        self.broker = Broker(app.settings, app.queues)
        self.dispatcher = Dispatcher(app, self.broker, Outage(), lease, self.changed.append)
        self.crew = self.dispatcher._crew

    def close(self):
        self.dispatcher._selector.close()
        os.close(self.dispatcher._mailbox._reader)
        os.close(self.dispatcher._mailbox._writer)
        self.broker.close()

    def join(self, number=1, *, is_ready=True):
        child = self.make_child(number)
        child.is_ready = False
        self.dispatcher.join_child(child)
        if is_ready:
            self.say(child, Ready())
        return child

    def say(self, child, *frames):
        """Have the dispatcher hear what a worker says."""
        for frame in frames:
            child.theirs.send(frame)
        self.dispatcher._attend(child, selectors.EVENT_READ)

    def heard(self, child):
        """Return the kinds of the frames that a worker was sent."""
        return [type(frame) for frame in child.theirs.receive()]

    def give(self, child, *payloads):
        """Claim payloads for a worker's number; returns the slots that it got, and what nobody could take."""
        before = set(child.assigned)
        surplus = self.crew.distribute([Claim(child.lanes[1], payload) for payload in payloads])
        return [slot for slot in child.assigned if slot not in before], surplus

    def finish(self, child, slot):
        self.say(child, Done([slot], int(slot not in child.async_slots), 0.2))

    def die(self, child):
        child.theirs.close()
        self.dispatcher._attend(child, selectors.EVENT_READ)

    @property
    def wanted(self):
        """The numbers that something would be claimed for."""
        return [number for number, _ in self.crew.wants(NEVER)]


@pytest.fixture
def make_stage(make_child):
    stages = []

    def make(**options):
        stages.append(Stage(make_child, **options))
        return stages[-1]

    yield make
    for stage in stages:
        stage.close()


def serves(stage, child):
    """Whether a sync task that is claimed now goes to this worker, which has none; it is finished at once."""
    (slots, surplus) = stage.give(child, SYNC)
    for slot in slots:
        stage.finish(child, slot)
    return bool(slots) and not surplus


def test_a_successor_serves_when_the_last_task_of_its_predecessor_has_ended(make_stage):
    stage = make_stage(max_tasks_per_worker=1)
    old = stage.join()
    ((slot,), _) = stage.give(old, SYNC)
    assert stage.changed[-1] is old
    assert old.needs_successor
    new = stage.join()
    assert new.is_ready
    assert (new.can_serve, stage.wanted) == (False, [])
    assert not stage.crew.has_idle(NEVER)
    stage.finish(old, slot)

    assert stage.heard(old) == [Assign, Stop]
    assert (new.can_serve, stage.wanted) == (True, [1])
    assert stage.crew.has_idle(NEVER)
    assert serves(stage, new)


def test_one_that_is_ready_too_late_serves_then(make_stage):
    stage = make_stage(max_tasks_per_worker=1)
    old = stage.join()
    ((slot,), _) = stage.give(old, SYNC)
    new = stage.join(is_ready=False)
    stage.finish(old, slot)
    assert stage.wanted == []
    stage.say(new, Ready())

    assert stage.wanted == [1]
    assert serves(stage, new)


def test_what_a_predecessor_was_claimed_for_too_late_is_given_back_and_not_to_a_second_one(
    make_stage,
):
    stage = make_stage(max_tasks_per_worker=1)
    old = stage.join()
    stage.give(old, SYNC)
    new = stage.join()

    assert stage.give(new, SYNC) == ([], [Claim(new.lanes[1], SYNC)])


@pytest.mark.parametrize("was_retired", [False, True])
def test_a_successor_serves_when_its_predecessor_dies_at_its_task(make_stage, was_retired):
    stage = make_stage(max_tasks_per_worker=None if was_retired else 1)
    old = stage.join()
    ((slot,), _) = stage.give(old, SYNC)
    old.progress.states[slot] = STARTED
    if was_retired:
        stage.dispatcher.retire_child(old)
    new = stage.join()
    assert stage.wanted == []
    stage.die(old)

    assert stage.wanted == [1]
    assert serves(stage, new)


def test_a_predecessor_that_dies_behind_the_back_of_its_successor_changes_nothing(make_stage):
    stage = make_stage(max_tasks_per_worker=1)
    old = stage.join()
    ((slot,), _) = stage.give(old, SYNC)
    new = stage.join()
    stage.finish(old, slot)
    ((slot,), _) = stage.give(new, SYNC)
    newest = stage.join()
    stage.die(old)

    assert (newest.can_serve, stage.wanted) == (False, [])
    stage.finish(new, slot)
    assert serves(stage, newest)


def test_a_successor_does_not_wait_for_async_tasks(make_stage):
    """Neither where they are left of a mixture, nor where the last task of all is one."""
    for payloads in ([ASYNC, SYNC], [SYNC, ASYNC]):
        stage = make_stage(max_tasks_per_worker=2)
        old = stage.join()
        slots = [slot for payload in payloads for slot in stage.give(old, payload)[0]]
        new = stage.join()
        assert (new.can_serve, stage.wanted) == (False, []), payloads
        stage.finish(old, slots[payloads.index(SYNC)])

        assert (len(old.async_slots), new.can_serve, stage.wanted) == (1, True, [1]), payloads
        assert serves(stage, new)


def test_a_successor_does_not_wait_where_the_only_last_task_is_async(make_stage):
    stage = make_stage(max_tasks_per_worker=1)
    old = stage.join()
    assert stage.give(old, ASYNC)[1] == []
    assert old.needs_successor
    new = stage.join()

    assert (new.can_serve, stage.wanted) == (True, [1])
    assert serves(stage, new)


def test_a_successor_that_is_there_before_the_last_async_task_does_not_wait(make_stage):
    stage = make_stage()
    old = stage.join()
    stage.give(old, ASYNC)
    new = stage.join()
    assert not new.can_serve
    stage.dispatcher.retire_child(old)

    assert new.can_serve
    assert serves(stage, new)


def test_all_that_is_claimed_for_a_successor_reaches_it_while_its_predecessor_has_async_tasks(
    make_stage,
):
    stage = make_stage()
    old = stage.join()
    stage.give(old, ASYNC)
    stage.dispatcher.retire_child(old)
    new = stage.join()
    stage.crew.update(old)  # so that this test does not depend on the one above
    new._window = 8
    new.observe(1, 1e-6)

    assert stage.crew.wants(NEVER) == [(1, 8)]
    slots, surplus = stage.give(new, *[SYNC] * 8)
    assert (len(slots), surplus) == (8, [])


def test_three_generations_serve_one_after_another(make_stage):
    stage = make_stage(max_tasks_per_worker=2)
    first = stage.join()
    (_, slot) = (*stage.give(first, ASYNC)[0], *stage.give(first, SYNC)[0])
    second = stage.join()
    stage.finish(first, slot)
    (_, slot) = (*stage.give(second, ASYNC)[0], *stage.give(second, SYNC)[0])
    third = stage.join()

    # The first has only async tasks, but the second runs a sync one.
    assert [child.can_serve for child in (first, second, third)] == [False] * 3
    assert stage.wanted == []
    stage.finish(second, slot)
    assert stage.wanted == [1]
    assert serves(stage, third)
    stage.die(first)
    stage.finish(second, *second.async_slots)
    assert stage.heard(second) == [Assign, Assign, Stop]
    assert serves(stage, third)


@pytest.mark.parametrize("order", ["first dies first", "second dies first"])
def test_the_third_waits_until_both_before_it_are_gone_or_done(make_stage, order):
    stage = make_stage(max_tasks_per_worker=2)
    first = stage.join()
    (_, slot) = (*stage.give(first, ASYNC)[0], *stage.give(first, SYNC)[0])
    second = stage.join()
    stage.finish(first, slot)
    stage.give(second, ASYNC)
    stage.give(second, SYNC)
    third = stage.join()
    assert not third.can_serve
    if order == "first dies first":
        stage.die(first)
        assert not third.can_serve
    stage.die(second)

    assert stage.wanted == [1]
    assert serves(stage, third)


def test_a_successor_that_dies_while_it_waits_is_succeeded(make_stage):
    stage = make_stage(max_tasks_per_worker=1)
    first = stage.join()
    ((slot,), _) = stage.give(first, SYNC)
    second = stage.join()
    stage.die(second)
    assert stage.changed[-1] is second
    third = stage.join()
    assert not third.can_serve
    stage.finish(first, slot)

    assert serves(stage, third)


def test_a_successor_that_is_to_retire_while_it_waits_exits_and_never_serves(make_stage):
    stage = make_stage(max_tasks_per_worker=1)
    first = stage.join()
    ((slot,), _) = stage.give(first, SYNC)
    second = stage.join()
    stage.dispatcher.retire_child(second)
    assert stage.heard(second) == [Recall, Stop]
    third = stage.join()
    assert not third.can_serve
    stage.finish(first, slot)

    assert not second.can_serve
    assert serves(stage, third)


def test_other_numbers_are_not_concerned(make_stage):
    stage = make_stage()
    one, other = stage.join(1), stage.join(2)
    stage.give(one, SYNC)
    stage.dispatcher.retire_child(one)
    ((slot,), _) = stage.give(other, SYNC)
    successor = stage.join(1)
    stage.finish(other, slot)

    assert stage.wanted == [2]
    assert not successor.can_serve


# -- any order of events ---------------------------------------------------------------------------


class Play(Stage):
    """Plays main thread and workers of two numbers by chance."""

    def __init__(self, make_child, seed):
        self.chance = random.Random(seed)
        most = self.chance.choice([None, 1, 2, 5])
        super().__init__(make_child, max_tasks_per_worker=most, async_concurrency=3)
        self.to_spawn = [1, 2]
        self.everyone = []

    def act(self):
        """Let something happen; returns what."""
        what = self.chance.choices(*zip(*WEIGHTS.items(), strict=True))[0]
        getattr(self, what)()
        self.answer()
        self.look_after()
        return what

    def any_child(self):
        return self.chance.choice(sorted(self.crew.children, key=self.everyone.index) or [None])

    def spawn(self):
        if self.to_spawn:
            number = self.to_spawn.pop(self.chance.randrange(len(self.to_spawn)))
            self.everyone.append(self.join(number, is_ready=False))

    def boot(self):
        booting = [child for child in self.everyone if not (child.is_ready or child.is_gone)]
        if booting:
            self.say(self.chance.choice(booting), Ready())

    def claim(self):
        for number, room in self.crew.wants(NEVER)[:1]:
            child = next(c for c in self.everyone if c.number == number)
            count = self.chance.randint(1, room)
            self.give(child, *self.chance.choices([SYNC, ASYNC], k=count))

    def broadcast(self):
        self.dispatcher.relay(self.chance.choice([SYNC, ASYNC]))
        self.crew.relay(NEVER)

    def begin(self):
        if (child := self.any_child()) and child.progress.slot < 0:
            for slot in child.assigned:
                if slot not in child.async_slots:
                    child.progress.begin(slot, 0.0, None, None)
                    return

    def end_sync(self):
        if (child := self.any_child()) and (slot := child.progress.slot) >= 0:
            child.progress.end()
            self.say(child, Done([slot], 1, self.chance.choice([1e-6, 1.0])))

    def end_async(self):
        if (child := self.any_child()) and child.async_slots:
            self.say(child, Done([self.chance.choice(list(child.async_slots))], 0, 0.0))

    def recall(self):
        self.crew.recall(NEVER)

    def retire(self):
        if child := self.any_child():
            self.dispatcher.retire_child(child)

    def end(self):
        if child := self.any_child():
            self.die(child)

    def answer(self):
        """Have the workers answer what they were asked."""
        for child in sorted(self.crew.children, key=self.everyone.index):
            for kind in self.heard(child):
                if kind is Recall:
                    running = child.progress.slot
                    unstarted = set(child.assigned) - set(child.async_slots) - {running}
                    self.say(child, Recalled(sorted(unstarted)))
                elif kind is Stop:
                    assert not child.assigned, "told to exit with something to do"
                    self.die(child)

    def look_after(self):
        for child in self.changed:
            is_due = child.needs_successor or child.is_gone
            if is_due and not child.has_successor:
                child.has_successor = True
                self.to_spawn.append(child.number)
        self.changed.clear()

    def check(self):
        for number in (1, 2):
            group = [
                child for child in self.everyone if child.number == number and not child.is_gone
            ]
            runners = [child for child in group if child.waiting or child.is_idle]
            assert len(runners) <= 1, "two of one number for sync tasks"
            able = [c for c in group if c.is_ready and not c.is_retiring and c.left != 0]
            is_busy = any(child.waiting for child in group)
            assert is_busy or not able or any(c.can_serve for c in able), "nobody serves"


WEIGHTS = {
    "spawn": 5,
    "boot": 5,
    "claim": 10,
    "broadcast": 1,
    "begin": 10,
    "end_sync": 8,
    "end_async": 4,
    "recall": 1,
    "retire": 1,
    "end": 1,
}


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_one_of_each_number_serves_and_never_two(make_child, seed):
    play = Play(make_child, seed)
    happened = []
    try:
        for _ in range(400):
            happened.append(play.act())
            play.check()
    except AssertionError as error:
        raise AssertionError(f"{error}, after {happened[-12:]}") from error
    finally:
        play.close()
    assert len(play.everyone) > 8
