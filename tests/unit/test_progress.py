"""What a worker shows in memory that it shares with its supervisor."""

import os

import pytest

from wakaq.progress import FINISHED, FREE, ROWS, SIZE, STARTED, Progress


@pytest.fixture
def views(tmp_path):
    """The worker's view and the supervisor's, of one file."""
    with (tmp_path / "progress").open("w+b") as file:
        os.ftruncate(file.fileno(), SIZE)
        worker, supervisor = Progress(file.fileno()), Progress(file.fileno())
    # The file may be closed. Each view has a descriptor of its own, until it is forgotten.
    supervisor.end()  # as whoever makes the memory does
    both = [worker, supervisor]
    del worker, supervisor
    yield both
    both.clear()


def test_progress_is_seen_through_the_memory_that_is_shared(views):
    worker, supervisor = views
    assert (supervisor.row, supervisor.soft_deadline, supervisor.pong_at) == (-1, 0.0, 0.0)
    assert supervisor.states[ROWS - 1] == FREE
    worker.begin(ROWS - 1, 100.0, 2.0, 3.0)
    worker.pong_at = 99.0

    assert (supervisor.row, supervisor.started_at) == (ROWS - 1, 100.0)
    assert (supervisor.soft_deadline, supervisor.hard_deadlines[ROWS - 1]) == (102.0, 103.0)
    assert supervisor.states[ROWS - 1] == STARTED
    assert supervisor.pong_at == 99.0
    worker.states[ROWS - 1] = FINISHED
    worker.end(ROWS - 1)
    assert (supervisor.row, supervisor.soft_deadline) == (-1, 0.0)
    assert supervisor.hard_deadlines[ROWS - 1] == 0.0
    assert supervisor.states[ROWS - 1] == FINISHED


def test_rows_do_not_touch_each_other(views):
    worker, supervisor = views
    for row in range(ROWS):
        worker.states[row] = row % 4
        worker.hard_deadlines[row] = float(row)

    assert list(supervisor.states) == [row % 4 for row in range(ROWS)]
    assert list(supervisor.hard_deadlines) == [float(row) for row in range(ROWS)]
    assert supervisor.row == -1


def test_a_task_without_limits_clears_those_of_the_one_before(views):
    worker, _ = views
    worker.begin(7, 100.0, 2.0, 3.0)
    worker.end(7)
    worker.begin(7, 200.0, None, None)

    assert (worker.soft_deadline, worker.hard_deadlines[7]) == (0.0, 0.0)
