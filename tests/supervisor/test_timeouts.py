"""Limits on the time of tasks; each tick is called with a time of ours."""

import os
import signal

import pytest

from wakaq.store.dead_letter import Reason
from wakaq.supervisor.child import Death
from wakaq.supervisor.timeouts import Timeouts, overdue

LISTEN = """
trap 'echo USR1' USR1
trap 'echo USR2' USR2
trap 'echo WINCH' WINCH
echo begun
while :; do sleep 0.01; done
"""


@pytest.fixture
def listener(make_child):
    """A worker that says which signals it gets."""
    child = make_child(1, "sh", "-c", LISTEN)
    assert heard(child) == "begun"
    return child


def heard(child):
    """Return the next signal that it has got."""
    return child.process.stdout.readline().decode().strip()


def has_heard_nothing(child):
    """Tell whether it has got no signal since the last look: of several, it says this one last."""
    child.signal(signal.SIGWINCH)
    return heard(child) == "WINCH"


def test_a_child_is_overdue_only_past_its_hard_timeout(child):
    assert overdue(child, 1e9) is None
    (row,) = child.run("a", now=100.0, hard=5.0)
    assert overdue(child, 104.999) is None
    assert overdue(child, 105.0) == (row, 105.0)
    child.progress.end()

    assert overdue(child, 200.0) is None


def test_a_task_without_a_hard_timeout_is_never_overdue(child):
    child.run("a", now=100.0)

    assert overdue(child, 1e9) is None


def test_an_async_task_is_overdue_beside_a_sync_one_that_is_not(child):
    child.run("a", now=100.0, hard=50.0)
    (row,) = child.have("b", is_async=True)
    child.progress.hard_deadlines[row] = 120.0

    assert overdue(child, 119.0) is None
    assert overdue(child, 120.0) == (row, 120.0)


def test_a_task_is_killed_a_tick_after_its_stacks_were_asked_for(listener, outage, caplog):
    timeouts = Timeouts(lambda: [listener], outage)
    (row,) = listener.run("a", now=100.0, hard=5.0)
    timeouts.tick(104.9)
    assert has_heard_nothing(listener)
    timeouts.tick(105.0)
    assert heard(listener) == "USR1"
    os.write(listener.stacks_fd, b"in time.sleep")
    timeouts.tick(105.1)

    assert listener.process.wait(5) == -signal.SIGKILL
    assert listener.death == Death(Reason.HARD_TIMEOUT, row, 105.0, "in time.sleep")
    assert "a() ran into its hard timeout after 5.1 s. It was at:\nin time.sleep" in caplog.text


def test_a_task_that_ends_while_its_stacks_are_written_is_spared_and_so_is_the_next(
    listener, outage
):
    timeouts = Timeouts(lambda: [listener], outage)
    (row,) = listener.run("a", now=100.0, hard=5.0)
    timeouts.tick(105.0)
    listener.progress.end()
    listener.progress.begin(row, 105.05, None, 0.01)
    timeouts.tick(105.1)

    assert listener.death is None
    timeouts.tick(105.2)
    assert listener.death.deadline == pytest.approx(105.06)


def test_a_task_that_ends_just_before_the_kill_is_spared(child, outage):
    timeouts = Timeouts(lambda: [child], outage)
    child.run("a", now=100.0, hard=5.0)
    timeouts.tick(105.0)
    # At the last moment: after it was found to be overdue still.
    child.read_stacks = child.progress.end
    timeouts.tick(105.1)

    assert child.death is None


def test_a_soft_timeout_is_signalled_until_the_worker_has_seen_it(listener, outage):
    timeouts = Timeouts(lambda: [listener], outage)
    listener.run("a", now=100.0, soft=2.0)
    timeouts.tick(101.9)
    assert has_heard_nothing(listener)
    for now in (102.0, 102.1):
        timeouts.tick(now)
        assert heard(listener) == "USR2"
    listener.progress.soft_deadline = 0.0
    timeouts.tick(102.2)

    assert has_heard_nothing(listener)
    assert listener.death is None
