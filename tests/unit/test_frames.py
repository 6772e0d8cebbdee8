"""Frames between supervisor and worker, and the progress row in shared memory."""

import contextlib
import socket
import threading
from multiprocessing.sharedctypes import RawArray

import pytest

from wakaq.frames import (
    FINISHED,
    SLOTS,
    STARTED,
    Assign,
    Channel,
    Done,
    Failed,
    Outcome,
    Ping,
    Progress,
    Ready,
    Recall,
    Recalled,
    Stop,
)

# Shared memory is kept for the next one who asks, with its descriptors: have enough of it before the check for leaks.
RawArray("d", 1 << 17)


@pytest.fixture
def ends():
    """The supervisor's end and the worker's."""
    ours, theirs = socket.socketpair()
    ours.settimeout(0)
    with contextlib.closing(ours), contextlib.closing(theirs):
        yield Channel(ours), Channel(theirs)


@pytest.mark.parametrize(
    "frame",
    [
        Assign(1, 2, [3, 4], [b"\x00\xff", b""], is_urgent=True),
        Recall(),
        Ping(),
        Stop(),
        Ready(),
        Done([1], 1, 0.25),
        Outcome(1, "retry", b"new", 1.5),
        Recalled([]),
        Failed("ü"),
    ],
)
def test_a_frame_arrives_as_it_was_sent(ends, frame):
    ours, theirs = ends

    assert ours.send(frame)
    (arrived,) = theirs.receive()
    assert arrived == frame
    assert type(arrived) is type(frame)


def test_frames_arrive_in_order_and_whole(ends):
    ours, theirs = ends
    frames = [Done([number] * number, number, 0.0) for number in range(500)]
    threading.Thread(target=lambda: [theirs.send(frame) for frame in frames]).start()
    arrived = []
    while len(arrived) < 500:
        arrived += ours.receive()

    assert arrived == frames


def test_frames_of_two_threads_do_not_mix(ends):
    ours, theirs = ends
    texts = ["a" * 50_000, "b" * 50_000]
    threads = [
        threading.Thread(target=lambda text=text: [theirs.send(Failed(text)) for _ in range(50)])
        for text in texts
    ]
    for thread in threads:
        thread.start()
    arrived = []
    while len(arrived) < 100:
        arrived += ours.receive()
    for thread in threads:
        thread.join()

    assert sorted(frame.reason for frame in arrived) == sorted(texts * 50)


def test_the_supervisors_end_never_blocks_and_loses_nothing(ends):
    ours, theirs = ends
    frames = [Assign(0, 0, [number], [b"x" * 300_000]) for number in range(5)]
    assert [ours.send(frame) for frame in frames] == [False] * 5
    assert not ours.is_flushed
    arrived = []
    while len(arrived) < 5:
        ours.flush()
        arrived += theirs.receive()

    assert arrived == frames
    assert ours.is_flushed


def test_with_nothing_to_receive_the_supervisor_goes_on(ends):
    ours, _ = ends

    assert ours.receive() == []


def test_the_end_comes_after_the_last_frames(ends):
    ours, theirs = ends
    theirs.send(Done([1], 1, 0.0))
    theirs.close()

    assert ours.receive() == [Done([1], 1, 0.0)]
    with pytest.raises(EOFError):
        ours.receive()
    # Whoever still sends is not hurt: the reading side knows.
    assert ours.send(Ping())
    assert ours.is_flushed


def test_progress_is_seen_through_the_memory_that_is_shared():
    worker = Progress()
    supervisor = Progress(worker.memory)
    assert (supervisor.slot, supervisor.soft_deadline, supervisor.pong_at) == (-1, 0.0, 0.0)
    worker.begin(SLOTS - 1, 100.0, 2.0, 3.0)
    worker.pong_at = 99.0

    assert (supervisor.slot, supervisor.started_at) == (SLOTS - 1, 100.0)
    assert (supervisor.soft_deadline, supervisor.hard_deadlines[SLOTS - 1]) == (102.0, 103.0)
    assert supervisor.states[SLOTS - 1] == STARTED
    assert supervisor.pong_at == 99.0
    worker.states[SLOTS - 1] = FINISHED
    worker.end()
    assert (supervisor.slot, supervisor.soft_deadline) == (-1, 0.0)
    assert supervisor.states[SLOTS - 1] == FINISHED


def test_a_task_without_limits_clears_those_of_the_one_before():
    progress = Progress()
    progress.begin(7, 100.0, 2.0, 3.0)
    progress.end()
    progress.begin(7, 200.0, None, None)

    assert (progress.soft_deadline, progress.hard_deadlines[7]) == (0.0, 0.0)
