"""A request's way from its offer to its answer: really sent, to a real server."""

import contextlib
import queue
import re
import subprocess
import sys
import time

import pytest

from wakaq.service import Outage
from wakaq.store.turns import InFlight, Registered, Registration
from wakaq.supervisor.sender import Sender

LOW, TURNS = "wakaq:low", "wakaq:registry:turns"
LATER = 1e9  # a moment that does not come


class Talk:
    """A registered supervisor's turns, and the sender that sends them."""

    def __init__(self, app, outage, longest_pause=1.0):
        self.broker = app.broker
        (self.group,) = app.broker.groups
        self.inflight = InFlight(self.broker, self.group)
        self.inflight.begin(self.registration().send(self.broker))
        self.answers = queue.SimpleQueue()
        self.sender = Sender(self.broker, self.hand_over, outage, longest_pause)
        self.sender.start()

    def hand_over(self, *answer):
        self.answers.put(answer)

    def registration(self):
        return Registration(self.group, lambda _: {})

    def turn(self, wanted=1):
        return self.inflight.turn(wanted)

    def next_answer(self):
        """Return the next request that was answered, its answer, and what that took."""
        return self.answers.get(timeout=10)

    def take_note(self, turn, answer):
        """Do what the dispatcher does with an answer."""
        self.sender.take_note()
        return self.inflight.answered(turn, answer)

    def close(self):
        self.sender.stop()
        self.sender.join(5)
        assert not self.sender.is_alive()


@pytest.fixture
def talk(redis_app, outage, redis):  # noqa: ARG001 - it empties the server
    talk = Talk(redis_app, outage)
    yield talk
    talk.close()


@pytest.fixture
def server(make_server):
    return make_server()


@pytest.fixture
def impatient(make_app, server, outage):
    """The same, with a server of its own, which may be frozen, and does not get long to answer."""
    app = make_app(url=server.url, socket_timeout=0.1, wait_timeout=0.05)
    talk = Talk(app, outage)
    with contextlib.closing(app.broker):
        yield talk
        talk.close()


def is_silent(talk, seconds=0.05):
    """Whether nothing is answered for a moment."""
    with contextlib.suppress(queue.Empty):
        talk.answers.get(timeout=seconds)
        return False
    return True


# -- waiting ---------------------------------------------------------------------------------------


def test_a_request_that_is_due_is_sent_at_once_and_its_answer_handed_over(talk, redis):
    redis.rpush(LOW, "a")
    turn = talk.turn()
    assert talk.sender.is_open
    assert talk.sender.offer(turn, 0.0)
    sent, answer, took = talk.next_answer()

    assert sent is turn
    assert [claim.payload for claim in talk.take_note(turn, answer)] == [b"a"]
    assert 0.0 < took < 10.0


def test_a_request_waits_for_its_moment(talk):
    begin = time.monotonic()
    talk.sender.offer(talk.turn(), begin + 0.1)
    talk.next_answer()

    assert time.monotonic() >= begin + 0.1


def test_a_request_that_waits_is_replaced_by_one_with_more(talk, redis):
    redis.rpush(LOW, "a", "b", "c")
    assert talk.sender.offer(talk.turn(1), LATER)
    assert is_silent(talk)
    assert talk.sender.is_open
    more = talk.turn(3)
    assert talk.sender.offer(more, 0.0)
    sent, answer, _ = talk.next_answer()

    assert sent is more
    assert len(answer.claims) == 3
    assert is_silent(talk)


# -- wake-ups --------------------------------------------------------------------------------------


def test_a_wake_up_sends_the_request_that_waits(talk):
    turn = talk.turn()
    talk.sender.offer(turn, LATER)
    talk.sender.wake()

    # In the thread of whoever wakes: on an idle machine each hop between threads counts.
    assert talk.answers.get_nowait()[0] is turn


def test_a_wake_up_is_for_turns_alone(talk):
    talk.sender.wake()
    talk.sender.offer(talk.registration(), time.monotonic() + 0.1)
    assert is_silent(talk)

    assert isinstance(talk.next_answer()[1], Registered)


def test_a_wake_up_before_the_offer_sends_that_and_not_the_next(talk):
    talk.sender.wake()
    turn = talk.turn()
    talk.sender.offer(turn, LATER)
    sent, answer, _ = talk.next_answer()
    assert sent is turn
    talk.take_note(turn, answer)
    talk.sender.offer(talk.turn(), LATER)

    assert is_silent(talk)


def test_a_wake_up_during_a_turn_is_for_the_next_one(talk):
    turn = talk.turn()
    talk.sender.offer(turn, 0.0)
    _, answer, _ = talk.next_answer()
    talk.sender.wake()
    talk.take_note(turn, answer)
    following = talk.turn()
    talk.sender.offer(following, LATER)

    assert talk.next_answer()[0] is following


# -- sent ------------------------------------------------------------------------------------------


def test_a_request_that_was_sent_is_not_replaced_before_its_answer_is_noted(
    impatient, server, frozen
):
    talk = impatient
    with frozen(server):
        turn = talk.turn()
        assert talk.sender.offer(turn, 0.0)
        wait_until(lambda: not talk.sender.is_open)
        assert not talk.sender.offer(talk.turn(5), 0.0)
    sent, answer, _ = talk.next_answer()
    assert sent is turn
    assert not talk.sender.is_open
    assert not talk.sender.offer(talk.turn(5), 0.0)
    talk.take_note(turn, answer)

    assert talk.sender.is_open
    assert talk.sender.offer(talk.turn(5), LATER)


def test_after_errors_the_same_turn_is_sent_again_until_it_is_answered(
    impatient, server, frozen, caplog
):
    talk = impatient
    with contextlib.closing(server.client()) as redis:
        redis.rpush(LOW, "a", "b")
        turn = talk.turn(1)
        with frozen(server):
            talk.sender.offer(turn, 0.0)
            assert is_silent(talk, 0.6)  # several attempts wait in the server now
        _, answer, took = talk.next_answer()
        (claim,) = talk.take_note(turn, answer)

        assert (claim.payload, claim.number) == (b"a", 1)
        assert took >= 0.6
        # It was executed once.
        assert redis.lrange(LOW, 0, -1) == [b"b"]
        assert redis.hvals(TURNS)[0].split()[0] == b"1"
        assert caplog.text.count("Redis is away, will go on trying") == 1


def test_a_turn_is_answered_when_the_server_is_back(impatient, server, caplog):
    talk = impatient
    server.kill()
    talk.sender.offer(talk.turn(), 0.0)
    assert is_silent(talk, 0.3)
    server.start()

    # It knows nothing any more.
    assert talk.next_answer()[1] is None
    assert "Redis is away, will go on trying" in caplog.text


class Attempts(Outage):
    """Counts the attempts that have failed."""

    count = 0

    def begin(self, error):
        self.count += 1
        super().begin(error)


def test_the_pause_between_attempts_does_not_grow_for_ever(make_app, server):
    app, attempts = make_app(url=server.url), Attempts()
    with contextlib.closing(app.broker):
        talk = Talk(app, attempts, longest_pause=0.01)
        server.kill()
        talk.sender.offer(talk.turn(), 0.0)
        # That many would take minutes, if each pause were twice the one before.
        wait_until(lambda: attempts.count >= 20)
        talk.close()


def wait_until(is_true, within=5.0):
    deadline = time.monotonic() + within
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_turn_that_is_refused_three_times_is_an_eviction(talk, redis, caplog):
    redis.delete(TURNS)
    redis.set(TURNS, "no hash")
    turn = talk.turn()
    talk.sender.offer(turn, 0.0)

    assert talk.next_answer()[:2] == (turn, None)
    assert caplog.text.count("Redis refuses: ") == 1


def test_a_supervisor_that_cannot_be_registered_ends_with_a_status_of_its_own(redis, app_url):
    redis.set(TURNS, "no hash")
    script = (
        "import logging\n"
        "from wakaq import WakaQ\n"
        "from wakaq.service import Outage\n"
        "from wakaq.store.turns import Registration\n"
        "from wakaq.supervisor.sender import Sender\n"
        "logging.basicConfig()\n"
        f"broker = WakaQ(queues=['low'], url={app_url!r}).broker\n"
        "sender = Sender(broker, print, Outage(), 1.0)\n"
        "sender.start()\n"
        "sender.offer(Registration(broker.groups[0], lambda _: {}), 0.0)\n"
        "sender.join()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=15
    )

    assert ended.returncode == 5
    refusal = r"Redis refuses to register this supervisor in .*wakaq:registry:turns: WRONGTYPE"
    assert re.search(refusal, ended.stderr)


def test_a_registration_is_answered_with_an_id_that_is_known(talk, redis):
    talk.sender.offer(talk.registration(), 0.0)
    _, registered, _ = talk.next_answer()

    assert isinstance(registered, Registered)
    assert registered.supervisor_id.encode() in redis.hkeys(TURNS)


# -- the end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_offered", [False, True])
def test_a_sender_that_waits_is_stopped(talk, is_offered):
    if is_offered:
        talk.sender.offer(talk.turn(), LATER)
    talk.close()

    assert is_silent(talk, 0.0)


def test_a_sender_whose_server_does_not_answer_is_stopped(impatient, server, frozen):
    talk = impatient
    with frozen(server):
        talk.sender.offer(talk.turn(), 0.0)
        wait_until(lambda: not talk.sender.is_open)
        talk.close()

    assert is_silent(talk, 0.0)
