"""Who is silent, and what becomes of them; each tick is called with a time of ours."""

import signal

import pytest

from wakaq.channel import Assign, Ping
from wakaq.supervisor.heartbeat import SILENCE, Heartbeat


@pytest.fixture
def posted():
    return []


@pytest.fixture
def heartbeat(child, posted, outage):
    child.progress.pong_at = 100.0
    return Heartbeat(lambda: [child], posted.append, outage)


def beats(heartbeat, first, last):
    for now in range(first, last + 1):
        heartbeat.tick(float(now))


def test_a_worker_that_answers_is_pinged_every_second(child, heartbeat):
    for now in range(100, 104):
        heartbeat.tick(float(now))
        assert child.theirs.receive() == [Ping()]
        child.progress.pong_at = now + 0.1

    assert heartbeat.silent == frozenset()


def test_a_worker_that_is_silent_for_too_long_with_no_task_is_killed(child, heartbeat):
    beats(heartbeat, 100, 100 + int(SILENCE))
    assert heartbeat.silent == frozenset()
    heartbeat.tick(101.0 + SILENCE)

    assert heartbeat.silent == {child}
    assert child.death.reason == "it did not answer"
    assert child.process.wait(5) == -signal.SIGKILL
    # One ping is enough: what waits in front of it would only grow.
    assert child.theirs.receive() == [Ping()]


def test_a_worker_that_is_silent_while_a_task_runs_is_reported_once(child, heartbeat, caplog):
    child.run("a", now=99.0)
    beats(heartbeat, 100, 110 + int(SILENCE))

    assert heartbeat.silent == {child}
    assert child.death is None
    assert caplog.text.count("does not answer while it runs a()") == 1
    child.progress.pong_at = 200.0
    heartbeat.tick(111.0 + SILENCE)
    assert heartbeat.silent == frozenset()


def test_after_a_pause_of_our_own_workers_get_their_time_anew(child, heartbeat):
    heartbeat.tick(100.0)
    heartbeat.tick(101.0 + SILENCE)

    assert heartbeat.silent == frozenset()
    assert child.death is None


def test_a_worker_that_boots_is_not_pinged(child, heartbeat):
    child.has_served = False
    beats(heartbeat, 100, 102 + int(SILENCE))

    assert child.death is None


def fill(child):
    while child.channel.send(Assign("me", 0, [1], [1], [b"x" * 100_000])):
        pass


def empty(child):
    while not child.channel.flush():
        child.theirs.receive()


def test_a_worker_whose_channel_was_full_is_asked_later_and_lives(child, heartbeat):
    fill(child)
    heartbeat.tick(100.0)
    empty(child)
    beats(heartbeat, 101, 101)
    frames = []
    while Ping() not in frames:
        frames = child.theirs.receive()
    child.progress.pong_at = 101.5
    beats(heartbeat, 102, 103 + int(SILENCE / 2))
    child.progress.pong_at = 1e9
    heartbeat.tick(101.0 + SILENCE)

    assert child.death is None


def test_a_worker_whose_channel_stays_full_is_silent(child, heartbeat):
    fill(child)
    beats(heartbeat, 100, 101 + int(SILENCE))

    assert child.death.reason == "it did not answer"
    assert child.pinged_at == 0.0, "what waits in front of a ping would only grow"


def test_a_ping_that_is_cut_off_is_left_to_the_dispatcher(child, heartbeat, posted):
    fill(child)
    # So that the ping finds the channel flushed, and no room.
    child.channel._unsent, child.channel.is_flushed = b"", True
    heartbeat.tick(100.0)

    assert posted == [child]
