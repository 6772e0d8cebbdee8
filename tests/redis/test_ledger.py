"""What is owed to Redis after calls whose reply, or whose request, was lost."""

import pytest
import redis as redis_py

from wakaq.broker import Broker, TurnRefused
from wakaq.client import LONGEST_BACKOFF
from wakaq.supervisor.ledger import HAUNTED, INTERVAL, LOOK_EVERY, Evicted, Ledger
from wakaq.turn import Claim, Settlement

LOW, LANE, STATS = "wakaq:low", "wakaq:inflight:low:me:1", "wakaq:stats:low"
LOST = redis_py.ConnectionError("lost")


class Line(Broker):
    """A broker on a bad line: `loses` says of the next turns whether request or reply is lost."""

    def __init__(self, *args):
        super().__init__(*args)
        self.loses = []
        self.ghosts = []

    def turn(self, worker_id, fence, settlements=(), wants=()):
        loss = self.loses.pop(0) if self.loses else None
        settlements, wants = list(settlements), list(wants)
        if loss == "request":
            # It may be executed after all, much later.
            self.ghosts.append(lambda: super(Line, self).turn(worker_id, fence, settlements, wants))
            raise LOST
        claims = super().turn(worker_id, fence, settlements, wants)
        if loss == "reply":
            raise LOST
        return claims


@pytest.fixture
def line(two_queues):
    line = Line(two_queues.settings, two_queues.queues)
    line.register("me", {})
    yield line
    line.close()


@pytest.fixture
def ledger(line, two_queues):
    ledger = Ledger(line, two_queues.queues)
    ledger.rename("me")
    return ledger


def lane_of(ledger, number=1):
    return ledger.lanes(number)[1]


def compare(ledger, known=(), now=100.0):
    ledger.compare(known, ledger.lanes(1), now)


def lose(ledger, wants=()):
    """Make a turn that is lost, one way or the other."""
    with pytest.raises(redis_py.ConnectionError):
        ledger.turn(wants)
    ledger.doubt(100.0)


def test_turns_follow_each_other(ledger, redis):
    redis.rpush(LOW, "a", "b")
    assert [claim.payload for claim in ledger.turn([(1, 1)])] == [b"a"]
    ledger.add([Settlement(lane_of(ledger), "done", [b"a"])])
    assert not ledger.is_settled
    assert [claim.payload for claim in ledger.turn([(1, 1)])] == [b"b"]

    assert ledger.is_settled
    assert redis.hgetall(STATS) == {b"done": b"1"}


def ack(ledger, *payloads):
    ledger.ack([Claim(lane_of(ledger), payload) for payload in payloads], 1)


def test_what_a_worker_finished_in_a_row_is_one_settlement(ledger, redis):
    redis.rpush(LANE, "a", "b", "c", "d")
    ack(ledger, b"a")
    ack(ledger, b"b", b"c")
    assert len(ledger._pending) == 1
    ledger.turn([])

    assert redis.lrange(LANE, 0, -1) == [b"d"]
    assert redis.hgetall(STATS) == {b"done": b"3"}


def test_what_is_finished_after_a_lost_turn_is_not_taken_for_a_part_of_it(ledger, line, redis):
    redis.rpush(LANE, "a", "b")
    ack(ledger, b"a")
    line.loses = ["reply"]
    lose(ledger)
    ack(ledger, b"b")
    compare(ledger)
    ledger.turn([])

    assert ledger.is_settled
    assert redis.hgetall(STATS) == {b"done": b"2"}
    assert not redis.exists(LANE, LOW)


def test_broadcasts_are_not_owed(ledger):
    ledger.add([Settlement(None, "done", [b"a"])])

    assert ledger.is_settled


def test_after_a_lost_reply_acks_are_not_repeated_and_claims_are_given_back(ledger, line, redis):
    redis.rpush(LOW, "b", "c", "d")
    redis.rpush(LANE, "a")
    ledger.add([Settlement(lane_of(ledger), "done", [b"a"])])
    line.loses = ["reply"]
    lose(ledger, [(1, 2)])
    assert redis.lrange(LANE, 0, -1) == [b"b", b"c"]
    compare(ledger)

    assert [c.payload for c in ledger.turn([(1, 3)])] == [b"b", b"c", b"d"]
    assert redis.hgetall(STATS) == {b"done": b"1"}
    assert ledger.is_settled


def test_after_a_lost_request_everything_is_repeated(ledger, line, redis):
    redis.rpush(LOW, "b")
    redis.rpush(LANE, "a")
    ledger.add([Settlement(lane_of(ledger), "retry", [b"a"], b"A")])
    line.loses = ["request"]
    lose(ledger, [(1, 1)])
    compare(ledger)

    assert [c.payload for c in ledger.turn([(1, 2)])] == [b"b", b"A"]
    assert redis.hgetall(STATS) == {b"retried": b"1"}


def test_a_request_that_arrives_late_does_nothing_after_its_successor(ledger, line, redis):
    redis.rpush(LOW, "b", "c")
    line.loses = ["request"]
    lose(ledger, [(1, 1)])
    compare(ledger)
    assert [c.payload for c in ledger.turn([(1, 1)])] == [b"b"]

    with pytest.raises(TurnRefused):
        line.ghosts[0]()
    assert redis.lrange(LANE, 0, -1) == [b"b"]


def test_a_request_that_arrives_late_but_first_makes_its_successor_be_refused(ledger, line, redis):
    redis.rpush(LOW, "b", "c")
    redis.rpush(LANE, "a")
    ledger.add([Settlement(lane_of(ledger), "retry", [b"a"], b"A")])
    line.loses = ["request"]
    lose(ledger, [(1, 1)])
    compare(ledger)
    assert [c.payload for c in line.ghosts[0]()] == [b"b"]
    with pytest.raises(TurnRefused):
        ledger.turn([(1, 1)])
    ledger.doubt(100.0)
    compare(ledger)

    # What the ghost claimed unseen is given back, and what it settled is not settled again.
    assert [c.payload for c in ledger.turn([(1, 3)])] == [b"b", b"c", b"A"]
    assert redis.hgetall(STATS) == {b"retried": b"1"}


@pytest.mark.parametrize("losses", [["request", "reply"], ["reply", "request"], ["reply", "reply"]])
def test_two_lost_turns_in_a_row_settle_once(ledger, line, redis, losses):
    redis.rpush(LOW, "x", "y")
    redis.rpush(LANE, "a", "b")
    line.loses = losses
    ledger.add([Settlement(lane_of(ledger), "retry", [b"a"], b"A")])
    lose(ledger, [(1, 1)])
    compare(ledger, [Claim(lane_of(ledger), b"b")])
    ledger.add([Settlement(lane_of(ledger), "retry", [b"b"], b"B")])
    lose(ledger, [(1, 1)])
    compare(ledger)
    ledger.turn([])

    assert sorted(redis.lrange(LOW, 0, -1)) == [b"A", b"B", b"x", b"y"]
    assert redis.llen(LANE) == 0
    assert redis.hgetall(STATS) == {b"retried": b"2"}


def test_what_children_have_is_no_stray_and_equal_payloads_are_counted(ledger, redis):
    redis.rpush(LANE, "a", "a", "a")
    lane = lane_of(ledger)
    ledger.add([Settlement(lane, "done", [b"a"])])
    compare(ledger, [Claim(lane, b"a"), Claim(None, b"broadcast")])
    ledger.turn([])

    assert redis.lrange(LANE, 0, -1) == [b"a"]
    assert redis.lrange(LOW, 0, -1) == [b"a"]
    assert redis.hgetall(STATS) == {b"done": b"1"}


def test_one_that_is_not_registered_is_evicted(ledger, line):
    line.unregister("me")
    with pytest.raises(Evicted):
        compare(ledger)


def test_a_new_name_starts_with_new_lanes_and_turns(ledger, line, redis):
    old = lane_of(ledger)
    ledger.turn([])
    redis.rpush(old.key, "a")
    ledger.add([Settlement(old, "done", [b"a"])])
    line.register("new", {})
    ledger.rename("new")
    redis.rpush(LOW, "b")

    assert [claim.lane.key for claim in ledger.turn([(1, 1)])] == ["wakaq:inflight:low:new:1"]
    assert redis.keys("wakaq:inflight:low:me:*") == []


def test_in_doubt_the_server_is_asked_soon_then_from_time_to_time_then_rarely(ledger):
    assert ledger.compare_at == 0.0  # what an earlier life left is looked for at once
    compare(ledger, now=50.0)
    assert ledger.compare_at == 50.0 + INTERVAL
    assert not ledger.is_haunted(50.0)
    ledger.doubt(100.0)

    assert ledger.is_in_doubt
    assert 100.0 < ledger.compare_at < 100.2
    compare(ledger, now=100.05)
    assert not ledger.is_in_doubt
    # A call that was cut off may still be executed.
    assert ledger.is_haunted(100.05)
    assert ledger.compare_at == 100.05 + LOOK_EVERY
    assert ledger.is_haunted(99.9 + HAUNTED)
    assert not ledger.is_haunted(100.0 + HAUNTED)
    compare(ledger, now=101.0 + HAUNTED)
    assert ledger.compare_at == 101.0 + HAUNTED + INTERVAL


def test_in_doubt_nothing_counts_as_settled(ledger):
    compare(ledger)
    assert ledger.is_settled
    ledger.doubt(100.0)
    assert not ledger.is_settled
    compare(ledger)
    assert ledger.is_settled
    ledger.look()

    assert not ledger.is_settled
    assert ledger.compare_at == 0.0


def test_a_stray_that_comes_after_the_comparison_is_found_by_the_next(ledger, redis):
    ledger.doubt(100.0)
    compare(ledger)
    redis.rpush(LANE, "late")
    compare(ledger, now=115.0)
    ledger.turn([])

    assert redis.lrange(LOW, 0, -1) == [b"late"]
    assert redis.llen(LANE) == 0


def test_doubts_in_a_row_wait_ever_longer(ledger):
    waits = []
    for _ in range(12):
        ledger.doubt(100.0)
        waits.append(ledger.compare_at - 100.0)

    assert waits[0] < 0.06
    assert max(waits) <= LONGEST_BACKOFF
    assert min(waits[8:]) >= LONGEST_BACKOFF / 2


def test_after_a_lost_reply_an_equal_payload_that_came_with_it_is_not_acked(ledger, line, redis):
    redis.rpush(LOW, "a")
    redis.rpush(LANE, "a")
    ledger.add([Settlement(lane_of(ledger), "done", [b"a"])])
    line.loses = ["reply"]
    lose(ledger, [(1, 1)])
    compare(ledger)

    assert [c.payload for c in ledger.turn([(1, 2)])] == [b"a"]
    assert redis.hgetall(STATS) == {b"done": b"1"}
