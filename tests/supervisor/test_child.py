"""What a child's record holds, what is told of it, and how its process is killed."""

import os
import select
import signal

from wakaq.progress import ASSIGNED, FINISHED, ROWS, STARTED
from wakaq.store.turns import Claim
from wakaq.supervisor.child import Death

# -- what it has -----------------------------------------------------------------------------------


def test_what_is_assigned_is_known_by_its_row_until_it_is_released(child):
    claims = [Claim(child.queue, b"a", 7), Claim(child.queue, b"b", 8)]
    rows = child.assign(claims, is_async=False)

    assert [child.progress.states[row] for row in rows] == [ASSIGNED, ASSIGNED]
    assert child.assigned == dict(zip(rows, claims, strict=True))
    assert child.release(rows) == claims
    assert child.assigned == {}


def test_rows_are_used_again(child):
    rows = child.have(*["a"] * ROWS)
    assert sorted(rows) == list(range(ROWS))
    child.release(rows[3:5])

    assert sorted(child.have("b", "c")) == sorted(rows[3:5])


def test_async_tasks_are_counted_apart_from_sync_ones(child):
    child.have("a")
    rows = child.have("b", "c", is_async=True)
    assert (child.sync_count, len(child.async_rows)) == (1, 2)
    child.release(rows[:1])

    assert (child.sync_count, list(child.async_rows)) == (1, rows[1:])


def test_each_assignment_uses_up_what_a_worker_has_left(child):
    child.have("a")
    assert child.left is None
    child.left = 3
    child.have("b", "c")

    assert child.left == 1


# -- what is told of it ----------------------------------------------------------------------------


def test_a_worker_is_told_by_its_slot_and_its_pid(child):
    assert str(child) == f"Worker 1 (pid {child.pid})"


def test_what_runs_is_told_as_calls_with_the_moment_of_their_start(child):
    (row, _) = child.run("a", "b", now=100.0)
    (beside, waits) = child.have("c", "d", is_async=True)
    child.async_rows[beside] = 103.0
    child.progress.states[beside] = STARTED

    assert list(child.running()) == [(row, 100.0, "a()"), (beside, 103.0, "c()")]
    assert child.describe_running() == "a(), c()"
    child.progress.states[row] = FINISHED
    child.release([waits])
    assert child.describe_running() == "c()"
    child.release([beside])
    assert child.describe_running() == ""


# -- signals and the end ---------------------------------------------------------------------------


def test_stacks_are_those_that_were_asked_for_last(make_child):
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # which a new process inherits
    child = make_child()
    signal.signal(signal.SIGUSR1, before)
    os.write(child.stacks_fd, b"what was written for somebody else")
    child.ask_for_stacks()
    assert child.read_stacks() == ""
    os.write(child.stacks_fd, b"in time.sleep\xff")

    # However often: to read does not move where the worker writes.
    assert child.read_stacks() == child.read_stacks() == "in time.sleep\ufffd"


def test_stacks_are_told_without_what_led_to_the_workers_start(child):
    ours = '  File "/any/wakaq/worker/main.py", line 66 in main\n'
    task = '  File "/shop/tasks.py", line 3 in bake\n'
    start = '  File "/any/multiprocessing/process.py", line 108 in run\n' + ours
    threads = [f"Thread 0x1:\n{task}", f"Current thread 0x2:\n{task}{ours}{start}"]
    os.write(child.stacks_fd, "\n".join(threads).encode())

    assert child.read_stacks() == f"Thread 0x1:\n{task}\nCurrent thread 0x2:\n{task}{ours}"[:-1]


def test_stacks_are_asked_for_by_a_signal(child):
    child.ask_for_stacks()

    assert child.process.wait(5) == -signal.SIGUSR1


def test_a_signal_reaches_the_worker(child):
    child.signal(signal.SIGTERM)

    assert child.process.wait(5) == -signal.SIGTERM


def test_a_kill_ends_the_process_and_keeps_the_first_reason(child):
    child.kill(Death("first"))
    child.kill(Death("second"))

    assert child.process.wait(5) == -signal.SIGKILL
    assert child.death.reason == "first"


def test_a_worker_that_does_not_lead_its_group_yet_is_killed(make_child):
    child = make_child(is_leader=False)
    child.kill(Death("any"))

    assert child.process.wait(5) == -signal.SIGKILL


def test_a_kill_ends_what_the_task_has_started(make_child):
    child = make_child(1, "sh", "-c", "sleep 60 & echo begun; wait")
    assert child.process.stdout.readline()
    child.kill(Death("any"))

    # Read to its end, which comes when all who could write have ended.
    assert child.process.stdout.read() == b""


def leave_behind(make_child):
    """Return a child that has ended, and what its task has started has not."""
    child = make_child(1, "sh", "-c", "sleep 60 & echo begun")
    assert child.process.stdout.readline()
    child.process.wait(5)
    return child


def has_ended(child, within):
    poll = select.poll()
    poll.register(child.process.stdout, select.POLLIN)
    return bool(poll.poll(1000 * within))


def test_what_a_crashed_worker_leaves_behind_is_killed_when_it_is_reaped(make_child):
    child = leave_behind(make_child)
    child.reap()

    assert has_ended(child, within=5)


def test_what_a_worker_leaves_behind_that_was_told_to_exit_lives_on(make_child):
    child = leave_behind(make_child)
    child.stopped_at = 100.0
    child.reap()

    assert not has_ended(child, within=0.1)
    os.killpg(child.pid, signal.SIGKILL)


def test_a_reaped_worker_is_not_signalled_any_more(child):
    child.end()
    child.reap()
    child.signal(signal.SIGTERM)
    child.ask_for_stacks()
    child.kill(Death("late"))

    assert child.death is None
    assert child.read_stacks() == ""


def test_the_end_of_a_worker_is_seen_also_where_nobody_waits_for_it(child):
    poll = select.poll()
    poll.register(child.end_fd, select.POLLIN)
    assert poll.poll(0) == []
    os.kill(child.pid, signal.SIGKILL)

    assert poll.poll(5000)
