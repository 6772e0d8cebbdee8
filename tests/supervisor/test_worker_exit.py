"""What becomes of what a dead worker had, and what is told of its end."""

import json
from types import SimpleNamespace

import pytest

from wakaq import Queue
from wakaq.message import Message
from wakaq.progress import ASSIGNED, FINISHED, FREE, ROWS, STARTED
from wakaq.store.dead_letter import DeadLetter, Reason
from wakaq.store.settlement import ACK, REQUEUE, Action
from wakaq.store.turns import Claim
from wakaq.supervisor import worker_exit
from wakaq.supervisor.child import Death
from wakaq.supervisor.worker_exit import SHUTDOWN, describe_end, settlements

HIGH, LOW = Queue("high"), Queue("low")


class Record:
    """What is read of a child that is gone."""

    spawned_at = 0.0
    death = None
    was_running = ""
    rss = 0

    def __init__(self):
        self.assigned = {}
        self.progress = SimpleNamespace(states=bytearray(ROWS), hard_deadlines=[0.0] * ROWS)

    def __str__(self):
        return "Worker 1 (pid 7)"

    def have(self, *names, queue=LOW, state=ASSIGNED, hard_deadline=0.0, **counts):
        """Assign messages of these names; returns their rows."""
        rows = []
        for name in names:
            # Rows are no order.
            row = ROWS - 1 - len(self.assigned)
            payload = Message(name, [], {}, **counts).encode()
            self.assigned[row] = Claim(queue, payload, number=len(self.assigned) + 1)
            self.progress.states[row] = state
            self.progress.hard_deadlines[row] = hard_deadline
            rows.append(row)
        return rows


@pytest.fixture
def child():
    return Record()


def settled(child, most=2):
    """Return what is settled: action and name of each payload, in order."""
    return [
        (settlement.action, json.loads(claim.payload)["name"])
        for claim, settlement in settlements(child, most, "me")
    ]


def test_finished_is_acked_and_running_counted_and_unstarted_requeued_behind_it(child):
    child.have("a", state=FINISHED)
    child.have("b", state=STARTED)
    child.have("c", "d")

    # Each push to the front goes before the last one: what was running runs first, then c, then d.
    assert settled(child) == [
        (Action.ACK, "a"),
        (Action.REQUEUE, "d"),
        (Action.REQUEUE, "c"),
        (Action.REDELIVER, "b"),
    ]


def test_what_the_worker_had_settled_otherwise_but_not_reported_runs_again_uncounted(child):
    child.have("a", state=FREE)

    assert settled(child) == [(Action.REQUEUE, "a")]


def test_tasks_that_ran_beside_each_other_keep_their_order(child):
    child.have("a", "b", state=STARTED)
    child.have("c", state=STARTED, queue=HIGH)

    assert settled(child) == [(Action.REDELIVER, name) for name in "cba"]


def test_each_settlement_is_of_the_claim_that_the_child_had(child):
    child.have("a", state=FINISHED)
    child.have("b", queue=HIGH)
    claims = list(child.assigned.values())

    assert settlements(child, 2, "me") == [(claims[0], ACK), (claims[1], REQUEUE)]


@pytest.mark.parametrize(("before", "most"), [(0, 0), (2, 2), (5, 2)])
def test_a_task_that_takes_too_many_workers_along_is_a_dead_letter(child, before, most):
    child.have("a", state=STARTED, redelivered=before)
    ((claim, settlement),) = settlements(child, most, "me")
    letter = DeadLetter.decode(settlement.payload)

    assert settlement.action is Action.DEAD
    assert (letter.reason, letter.worker) == ("redelivered too often", "me")
    assert letter.payload == claim.payload
    assert letter.traceback == f"its worker died, {before + 1} times in all"


def test_why_we_killed_the_worker_is_told_in_the_letter(child):
    child.have("a", state=STARTED)
    child.death = Death("it took too much memory")
    ((_, settlement),) = settlements(child, 0, "me")

    assert "it took too much memory, 1 times" in DeadLetter.decode(settlement.payload).traceback


def test_a_redelivery_counts_and_keeps_everything_else(child):
    child.have("a", state=STARTED, retry=3, redelivered=1)
    ((_, settlement),) = settlements(child, 2, "me")

    assert Message.decode(settlement.payload) == Message("a", [], {}, retry=3, redelivered=2)


def test_a_shutdown_counts_against_nothing(child):
    child.have("a", state=STARTED, redelivered=2)
    child.have("b", redelivered=2)
    child.death = Death(SHUTDOWN)

    assert settled(child) == [(Action.REQUEUE, "b"), (Action.REQUEUE, "a")]


def test_a_hard_timeout_is_a_dead_letter_with_the_stacks(child):
    (row,) = child.have("a", state=STARTED, hard_deadline=105.0)
    child.have("b")
    child.death = Death(Reason.HARD_TIMEOUT, row, 105.0, "in time.sleep")
    (_, requeued), (_, dead) = settlements(child, 2, "me")
    letter = DeadLetter.decode(dead.payload)

    assert requeued.action is Action.REQUEUE
    assert dead.action is Action.DEAD
    assert (letter.reason, letter.traceback) == ("hard timeout", "in time.sleep")


def test_a_task_that_began_after_the_overdue_one_had_ended_is_not_blamed(child):
    # In the same row, so that only the deadline tells them apart.
    (row,) = child.have("next", state=STARTED, hard_deadline=109.9)
    child.death = Death(Reason.HARD_TIMEOUT, row, 105.0, "stacks")

    assert settled(child) == [(Action.REQUEUE, "next")]


@pytest.mark.parametrize("hard_deadline", [0.0, 105.0, 200.0])
def test_tasks_that_ran_beside_the_overdue_one_are_not_blamed(child, hard_deadline):
    (row,) = child.have("overdue", state=STARTED, hard_deadline=105.0)
    child.have("beside", state=STARTED, hard_deadline=hard_deadline)
    child.death = Death(Reason.HARD_TIMEOUT, row, 105.0, "stacks")

    assert settled(child) == [(Action.REQUEUE, "beside"), (Action.DEAD, "overdue")]


def test_a_broadcast_is_settled_like_others(child):
    child.have("all", queue=None)
    ((claim, settlement),) = settlements(child, 2, "me")

    assert (claim.queue, settlement.action) == (None, Action.REQUEUE)


def test_a_payload_that_is_no_message_ends_nothing(child):
    (row,) = child.have("a", state=STARTED)
    child.assigned[row] = Claim(LOW, b"\xff", number=1)
    ((_, settlement),) = settlements(child, 2, "me")

    assert settlement == REQUEUE


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (0, "exited with status 0"),
        (3, "exited with status 3"),
        (-11, "was killed by SIGSEGV"),
        (-40, "was killed by signal 40"),
        (None, "ended, nobody knows how"),
    ],
)
def test_a_status_is_said_as_people_say_it(child, status, said):
    assert describe_end(child, status).startswith(f"Worker 1 (pid 7) {said} after ")


def test_an_end_is_one_sentence_of_what_is_known(child, monkeypatch):
    child.spawned_at = 100.0
    monkeypatch.setattr(worker_exit, "time", SimpleNamespace(monotonic=lambda: 112.34))
    assert describe_end(child, 0) == "Worker 1 (pid 7) exited with status 0 after 12.3 s"
    child.death = Death("it took too much memory")
    child.was_running = "a(), b()"
    child.rss = 123_999_999

    assert describe_end(child, -9) == (
        "Worker 1 (pid 7) was killed by SIGKILL after 12.3 s, by us, because of: it took too much"
        " memory, while it ran a(), b(), last seen with 123 MB"
    )
