"""Frames between supervisor and worker."""

import contextlib
import multiprocessing
import threading

import pytest

from wakaq.channel import (
    Adopted,
    Assign,
    Channel,
    Done,
    Failed,
    Outcome,
    Ping,
    Ready,
    Recall,
    Recalled,
    Stop,
)
from wakaq.store.settlement import ACK, REQUEUE, Action, Settlement


@pytest.fixture
def ends():
    """The supervisor's end and the worker's."""
    ours, theirs = (contextlib.closing(end) for end in multiprocessing.Pipe())
    with ours as one, theirs as other:
        yield Channel(one, is_blocking=False), Channel(other, is_blocking=True)


def all_of(frames_expected, channel):
    arrived = []
    while len(arrived) < frames_expected:
        arrived += channel.receive()
    return arrived


@pytest.mark.parametrize(
    "frame",
    [
        Assign("me", 1, [3, 4], [7, 8], [b"\x00\xff", b""], is_urgent=True),
        Recall(),
        Adopted("me", [3, 4], [1, 0]),
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


@pytest.mark.parametrize(
    "settlement",
    [ACK, REQUEUE, Settlement(Action.DELAY, b"new", 1.5), Settlement(Action.DEAD, b"letter")],
)
def test_an_outcome_carries_a_settlement(ends, settlement):
    ours, theirs = ends
    theirs.send(Outcome.of(3, settlement))
    (arrived,) = ours.receive()

    assert (arrived.row, arrived.settlement) == (3, settlement)


def test_frames_arrive_in_order_and_whole(ends):
    ours, theirs = ends
    frames = [Done([number] * number, number, 0.0) for number in range(500)]
    sender = threading.Thread(target=lambda: [theirs.send(frame) for frame in frames])
    sender.start()
    arrived = all_of(500, ours)
    sender.join()

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
    arrived = all_of(100, ours)
    for thread in threads:
        thread.join()

    assert sorted(frame.reason for frame in arrived) == sorted(texts * 50)


def test_the_supervisors_end_never_blocks_and_loses_nothing(ends):
    ours, theirs = ends
    frames = [Assign("me", 0, [number], [number], [b"x" * 300_000]) for number in range(5)]
    assert [ours.send(frame) for frame in frames] == [False] * 5
    assert not ours.is_flushed
    arrived = []
    while len(arrived) < 5:
        ours.flush()
        arrived += theirs.receive()

    assert arrived == frames
    assert ours.is_flushed


@pytest.mark.parametrize("end", [0, 1])
def test_with_nothing_to_receive_nobody_waits(ends, end):
    assert ends[end].receive() == []


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
