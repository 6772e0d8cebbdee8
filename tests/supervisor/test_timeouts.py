"""Limits on the time of tasks; each tick is called with a time of ours."""

import os
import signal

import pytest

from wakaq.letters import HARD_TIMEOUT
from wakaq.supervisor.child import Death
from wakaq.service import Outage
from wakaq.supervisor.timeouts import Timeouts, overdue


@pytest.fixture
def outage():
    return Outage()


def test_a_child_is_overdue_only_past_its_hard_timeout(child):
    assert overdue(child, 1e9) is None
    (slot,) = child.run("a", now=100.0, hard=5.0)
    assert overdue(child, 104.999) is None
    assert overdue(child, 105.0) == (slot, 105.0)
    child.progress.end()

    assert overdue(child, 200.0) is None


def test_a_task_without_a_hard_timeout_is_never_overdue(child):
    child.run("a", now=100.0)

    assert overdue(child, 1e9) is None


def test_an_async_task_is_overdue_beside_a_sync_one_that_is_not(child):
    child.run("a", now=100.0, hard=50.0)
    (slot,) = child.have("b", is_async=True)
    child.progress.hard_deadlines[slot] = 120.0

    assert overdue(child, 119.0) is None
    assert overdue(child, 120.0) == (slot, 120.0)


def test_a_task_is_killed_a_tick_after_its_stacks_were_asked_for(child, outage, caplog):
    signals = []
    child.signal = signals.append
    timeouts = Timeouts(lambda: [child], outage)
    (slot,) = child.run("a", now=100.0, hard=5.0)
    timeouts.tick(104.9)
    assert signals == []
    timeouts.tick(105.0)
    assert signals == [signal.SIGUSR1]
    os.write(child.stacks_fd, b"in time.sleep")
    timeouts.tick(105.1)

    assert child.reap() == -signal.SIGKILL
    assert child.death == Death(HARD_TIMEOUT, slot, 105.0, "in time.sleep")
    assert "a() ran into its hard timeout after 5.1 s. It was at:\nin time.sleep" in caplog.text


def test_a_task_that_ends_while_its_stacks_are_written_is_spared_and_so_is_the_next(child, outage):
    child.signal = lambda _: None
    timeouts = Timeouts(lambda: [child], outage)
    (slot,) = child.run("a", now=100.0, hard=5.0)
    timeouts.tick(105.0)
    child.progress.end()
    child.progress.begin(slot, 105.05, None, 0.01)
    timeouts.tick(105.1)

    assert child.death is None
    timeouts.tick(105.2)
    assert child.death.deadline == pytest.approx(105.06)


def test_a_soft_timeout_is_signalled_until_the_worker_has_seen_it(child, outage):
    signals = []
    child.signal = signals.append
    timeouts = Timeouts(lambda: [child], outage)
    child.run("a", now=100.0, soft=2.0)
    for now in (101.9, 102.0, 102.1):
        timeouts.tick(now)
    child.progress.soft_deadline = 0.0
    timeouts.tick(102.2)

    assert signals == [signal.SIGUSR2, signal.SIGUSR2]
