"""What becomes of what a dead worker had, and what is told of its end."""

import json
from types import SimpleNamespace

import pytest

from wakaq.frames import FINISHED, FREE, STARTED
from wakaq.letters import HARD_TIMEOUT, Letter
from wakaq.message import Message
from wakaq.supervisor import autopsy
from wakaq.supervisor.autopsy import SHUTDOWN, describe_end, grouped, settle
from wakaq.supervisor.child import Death
from wakaq.turn import Claim


def settled(child, most=2):
    """Return what is settled: action and names of the payloads."""
    return [
        (one.action, [json.loads(payload)["name"] for payload in one.payloads])
        for one in settle(child, most, "me")
    ]


def test_finished_is_acked_and_running_counted_and_unstarted_requeued_behind_it(child):
    slots = child.run("a", "b", "c", "d")
    child.progress.states[slots[0]] = FINISHED
    child.progress.states[slots[1]] = STARTED
    # Each push to the front goes before the last one, so what was running comes last here.
    assert settled(child) == [("done", ["a"]), ("requeue", ["c", "d"]), ("redeliver", ["b"])]


def test_what_the_worker_had_settled_otherwise_but_not_reported_runs_again_uncounted(child):
    slots = child.run("a")
    child.progress.states[slots[0]] = FREE

    assert settled(child) == [("requeue", ["a"])]


def test_lanes_are_settled_apart(child):
    child.have("a", "b")
    child.have("h", queue=0)
    child.have("c")

    assert settled(child) == [("requeue", ["c"]), ("requeue", ["h"]), ("requeue", ["a", "b"])]


@pytest.mark.parametrize(("before", "most"), [(0, 0), (2, 2), (5, 2)])
def test_a_task_that_takes_too_many_workers_along_is_a_dead_letter(child, before, most):
    child.run("a", redelivered=before)
    (settlement,) = settle(child, most, "me")
    letter = Letter.decode(settlement.new)

    assert settlement.action == "dead"
    assert (letter.reason, letter.worker) == ("redelivered too often", "me")
    assert letter.payload == settlement.payloads[0]
    assert letter.traceback == f"its worker died, {before + 1} times in all"


def test_a_redelivery_counts_and_keeps_everything_else(child):
    child.run("a", retry=3, redelivered=1)
    (settlement,) = settle(child, 2, "me")

    assert Message.decode(settlement.new) == Message("a", [], {}, retry=3, redelivered=2)


def test_a_shutdown_counts_against_nothing(child):
    child.run("a", "b", redelivered=2)
    child.death = Death(SHUTDOWN)

    assert settled(child) == [("requeue", ["b"]), ("requeue", ["a"])]


def test_a_hard_timeout_is_a_dead_letter_with_the_stacks(child):
    (slot, _) = child.run("a", "b", now=100.0, hard=5.0)
    child.death = Death(HARD_TIMEOUT, slot, 105.0, "in time.sleep")
    requeued, dead = settle(child, 2, "me")
    letter = Letter.decode(dead.new)

    assert requeued.action == "requeue"
    assert dead.action == "dead"
    assert (letter.reason, letter.traceback) == ("hard timeout", "in time.sleep")


def test_a_task_that_began_after_the_overdue_one_had_ended_is_not_blamed(child):
    # In the same slot, so that only the deadline tells them apart.
    (slot,) = child.run("next", now=104.9, hard=5.0)
    child.death = Death(HARD_TIMEOUT, slot, 105.0, "stacks")

    assert settled(child) == [("requeue", ["next"])]


def test_tasks_that_ran_beside_the_overdue_one_are_not_blamed(child):
    (slot,) = child.run("overdue", now=100.0, hard=5.0)
    (beside,) = child.have("beside", is_async=True)
    child.progress.states[beside] = STARTED
    child.death = Death(HARD_TIMEOUT, slot, 105.0, "stacks")

    assert sorted(settled(child)) == [("dead", ["overdue"]), ("requeue", ["beside"])]


def test_a_broadcast_is_settled_like_others(child):
    child.assign([Claim(None, b'{"name": "all"}')])
    (settlement,) = settle(child, 2, "me")

    assert (settlement.lane, settlement.action) == (None, "requeue")


def test_a_garbled_payload_ends_nothing(child):
    (slot,) = child.assign([Claim(child.lanes[0], b"\xff")])
    child.progress.states[slot] = STARTED
    (settlement,) = settle(child, 2, "me")

    assert settlement.action == "requeue"
    assert child.describe_running() == r"b'\xff'"


def test_neighbours_in_one_lane_are_grouped(child):
    high, low = child.lanes
    claims = [Claim(low, b"1"), Claim(low, b"2"), Claim(high, b"3"), Claim(low, b"4")]

    assert [(one.lane, one.payloads) for one in grouped("done", claims)] == [
        (low, [b"1", b"2"]),
        (high, [b"3"]),
        (low, [b"4"]),
    ]


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (0, "exited with status 0"),
        (3, "exited with status 3"),
        (-11, "was killed by SIGSEGV"),
        (-40, "was killed by signal 40"),
        (255, "ended, nobody knows how"),
        (None, "ended, nobody knows how"),
    ],
)
def test_a_status_is_said_as_people_say_it(child, status, said):
    assert f"Worker 1 (pid {child.pid}) {said} after " in describe_end(child, status)


def test_an_end_is_one_sentence_of_what_is_known(child, monkeypatch):
    child.spawned_at = 100.0
    monkeypatch.setattr(autopsy, "time", SimpleNamespace(monotonic=lambda: 112.34))
    assert describe_end(child, 0) == f"Worker 1 (pid {child.pid}) exited with status 0 after 12.3 s"
    child.death = Death("it took too much memory")
    child.victims = "a(), b()"
    child.rss = 123_999_999

    assert describe_end(child, -9) == (
        f"Worker 1 (pid {child.pid}) was killed by SIGKILL after 12.3 s, by us, because of: it took"
        " too much memory, while it ran a(), b(), last seen with 123 MB"
    )
