"""Turns: what one makes of the whole database, and how it is sent until it is answered."""

import contextlib

import pytest
import redis as redis_py

from wakaq import WakaQ
from wakaq.store.broker import Broker
from wakaq.store.connection import LONGEST_BACKOFF
from wakaq.store.settlement import ACK, REQUEUE, Action, Settlement
from wakaq.store.turns import (
    Claim,
    InFlight,
    Refused,
    Registered,
    Registration,
    TurnAnswer,
    exchange,
)

TURNS, REGISTRY = "wakaq:registry:turns", "wakaq:registry:workers"
HIGH, LOW, HEAD = "wakaq:high", "wakaq:low", "wakaq:head:low"
IN_HIGH, IN_LOW = "wakaq:inflight:high:me", "wakaq:inflight:low:me"
ETA, DEAD, STATS = "wakaq:eta:low", "wakaq:dead:low", "wakaq:stats:low"
LOST = redis_py.ConnectionError("lost")
CHANGED = {Action.RETRY: b"A", Action.REDELIVER: b"A", Action.DELAY: b"A", Action.DEAD: b"A"}
MOVES = [action for action in Action if action is not Action.ACK]


def settlement(action):
    return Settlement(action, CHANGED.get(action, b""))


def payloads(claims):
    return [claim.payload.decode() for claim in claims]


# -- which turns are executed ----------------------------------------------------------------------


def test_an_empty_turn_only_counts(me, database):
    assert me.take_turn() == []
    assert database() == {TURNS: {"me": "1 T"}}


@pytest.mark.parametrize("state", [None, "0 8", "2 7", "3 7 1:1:1"])
def test_a_turn_that_does_not_follow_the_last_one_changes_nothing(
    me, broker, redis, database, state
):
    redis.rpush(LOW, "waits")
    redis.hset(IN_LOW, "1", "a")
    redis.delete(TURNS)
    if state:
        redis.hset(TURNS, "me", state)
    claim = me.claims[1] = Claim(broker.queues[1], b"a", 1)
    me.settle(claim, ACK)
    before = database()

    assert me.turn(5).send(broker) is None
    assert database() == before


@pytest.mark.parametrize("action", Action)
def test_a_turn_that_is_sent_again_is_answered_again_and_happens_once(
    me, broker, redis, database, action
):
    first, *_ = me.hold("a", "b")
    redis.rpush(HIGH, "h")
    redis.rpush(LOW, "c", "d")
    me.settle(first, settlement(action))
    turn = me.turn(2)
    answer = turn.send(broker)
    before = database()

    for _ in range(3):
        again = turn.send(broker)
        assert again.token == answer.token
        assert again.failed == answer.failed == set()
        assert [(c.queue, c.number, c.payload) for c in again.claims] == [
            (c.queue, c.number, c.payload) for c in answer.claims
        ]
    assert database() == before
    second = {Action.REQUEUE: "a", Action.REDELIVER: "A"}.get(action, "c")
    assert payloads(answer.claims) == ["h", second]


def test_a_turn_that_is_sent_again_says_again_what_failed(me, broker, redis):
    first, second = me.hold("a", "b")
    redis.set(LOW, "text")
    me.settle(second, ACK)
    me.settle(first, REQUEUE)
    turn = me.turn(0)
    assert turn.send(broker).failed == {0}
    redis.delete(LOW)

    assert turn.send(broker).failed == {0}
    me.answered(turn, turn.send(broker))
    assert me.refused == [(first, REQUEUE)]
    assert me.claims == {1: first}


def test_an_older_turn_that_arrives_late_changes_nothing(me, broker, redis):
    redis.rpush(LOW, "a", "b")
    turn = me.turn(1)
    me.answered(turn, turn.send(broker))
    assert payloads(me.take_turn(1)) == ["b"]

    assert turn.send(broker) is None
    assert redis.hgetall(IN_LOW) == {b"1": b"a", b"2": b"b"}


# -- claims ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "claimed"),
    [(1, ["h1"]), (3, ["h1", "h2", "l1"]), (9, ["h1", "h2", "l1", "l2"]), (0, [])],
)
def test_claims_come_by_priority(me, redis, wanted, claimed):
    redis.rpush(HIGH, "h1", "h2")
    redis.rpush(LOW, "l1", "l2")
    claims = me.take_turn(wanted)

    assert payloads(claims) == claimed
    assert [claim.queue.name[0] for claim in claims] == [name[0] for name in claimed]
    waiting = redis.lrange(HIGH, 0, -1) + redis.lrange(LOW, 0, -1)
    assert [*claimed, *(one.decode() for one in waiting)] == ["h1", "h2", "l1", "l2"]


def test_claims_are_in_flight_by_number_and_remembered(me, redis, database):
    redis.rpush(HIGH, "h")
    redis.rpush(LOW, "a", "b")
    redis.rpush(HEAD, "first")
    claims = me.take_turn(3)

    assert [claim.number for claim in claims] == [1, 2, 3]
    assert me.claims == {claim.number: claim for claim in claims}
    assert database() == {
        LOW: ["b"],
        IN_HIGH: {"1": "h"},
        IN_LOW: {"2": "first", "3": "a"},
        TURNS: {"me": "1 T 0:1:1 1:2:1 1:3:1"},
    }


def test_numbers_are_never_used_again(me, redis):
    redis.rpush(LOW, "a")
    me.take_turn(10)
    redis.rpush(LOW, "b")

    assert [claim.number for claim in me.take_turn(10)] == [11]


def test_settlements_come_before_claims(me):
    (claim,) = me.hold("a")
    me.settle(claim, REQUEUE)

    assert payloads(me.take_turn(1)) == ["a"]


def test_payloads_are_opaque_bytes(me, redis):
    secrets = [b'{"args": [], "n": 12345678901234567890}', b"\x00\xff\n", b"", b"x" * 100_000]
    redis.rpush(LOW, *secrets)
    claims = me.take_turn(4)

    assert [claim.payload for claim in claims] == secrets
    assert redis.hvals(IN_LOW) == secrets


def test_thousands_are_claimed_answered_again_and_acked_at_once(me, broker, redis, database):
    names = [str(number) for number in range(5_003)]
    redis.rpush(LOW, *names)
    turn = me.turn(5_001)
    answers = [turn.send(broker) for _ in range(2)]

    for answer in answers:
        assert payloads(answer.claims) == names[:5_001]
        assert [claim.number for claim in answer.claims] == list(range(1, 5_002))
    claims = me.answered(turn, answers[1])
    me.acknowledge(claims)
    turn = me.turn(0)
    assert turn.args[5:] == ["ack", 1, 1, 1, 5_001]
    me.answered(turn, turn.send(broker))
    assert database() == {
        LOW: ["5001", "5002"],
        STATS: {"done": "5001"},
        TURNS: {"me": "2 T"},
    }


def test_thousands_are_acked_out_of_order_in_ranges(me, broker, redis):
    redis.rpush(LOW, *range(5_000))
    claims = me.take_turn(5_000)
    me.acknowledge(claims[4_000:])
    me.acknowledge(claims[2_998:0:-3])
    turn = me.turn(0)

    assert turn.args[5:7] == ["ack", 1]
    assert turn.args[-2:] == [4_001, 5_000]
    me.answered(turn, turn.send(broker))
    left = {claim.number for claim in claims if claim.number}
    assert left == {int(number) for number in redis.hkeys(IN_LOW)} == set(me.claims)
    assert int(redis.hget(STATS, "done")) == 5_000 - len(left) == 2_000


# -- settlements -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("done", "left"),
    [("a", "bc"), ("abc", ""), ("ca", "b"), ("ac", "b"), ("b", "ac"), ("", "abc")],
)
def test_an_ack_is_of_a_number_in_any_order(me, redis, done, left):
    claims = dict(zip("abc", me.hold("same", "same", "other"), strict=True))
    for name in done:
        me.settle(claims[name], ACK)
    me.take_turn()

    numbers = [str(claims[name].number).encode() for name in left]
    assert redis.hkeys(IN_LOW) == numbers
    assert int(redis.hget(STATS, "done") or 0) == len(done)
    assert [claims[name].number for name in done] == [0] * len(done)
    assert me.to_settle == 0


@pytest.mark.parametrize(
    ("action", "becomes"),
    [
        (Action.ACK, {LOW: ["waits"], STATS: {"done": "1"}}),
        (Action.REQUEUE, {LOW: ["a", "waits"]}),
        (Action.REDELIVER, {LOW: ["A", "waits"], STATS: {"redelivered": "1"}}),
        (Action.RETRY, {LOW: ["waits", "A"], STATS: {"retried": "1"}}),
        (Action.DEAD, {LOW: ["waits"], DEAD: ["A", "newer"], STATS: {"dead": "1"}}),
    ],
)
def test_what_each_settlement_makes_of_a_payload(me, redis, database, action, becomes):
    first, _ = me.hold("a", "b")
    redis.rpush(LOW, "waits")
    if action is Action.DEAD:
        redis.rpush(DEAD, "newer", "older")
    me.settle(first, settlement(action))
    me.take_turn()

    assert database() == {IN_LOW: {"2": "b"}, TURNS: {"me": "2 T"}} | becomes


def test_a_delay_is_counted_on_the_servers_clock(me, redis, database):
    (claim,) = me.hold("a")
    seconds, micros = redis.time()
    me.settle(claim, Settlement(Action.DELAY, b"A", 12.5))
    me.take_turn()

    found = database()
    due = found.pop(ETA)["A"]
    assert 0 <= due - 12.5 - seconds - micros / 1e6 < 1
    assert found == {STATS: {"retried": "1"}, TURNS: {"me": "2 T"}}


def test_where_no_dead_letters_are_kept_a_dead_payload_is_only_counted(app_url, redis, database):
    app = WakaQ(queues=["low"], url=app_url, dead_letters=0)
    with contextlib.closing(app.broker) as broker:
        redis.hset(TURNS, "me", "0 7")
        redis.rpush(LOW, "a")
        me = InFlight(broker, broker.groups[0])
        me.begin(Registered("me", "7"))
        turn = me.turn(1)
        (claim,) = me.answered(turn, turn.send(broker))
        me.settle(claim, settlement(Action.DEAD))
        me.turn(0).send(broker)

    assert database() == {STATS: {"dead": "1"}, TURNS: {"me": "2 T"}}


def test_what_goes_back_to_the_front_is_there_in_the_order_of_its_numbers(me, redis, database):
    a, b, c, d = me.hold("a", "b", "c", "d")
    redis.rpush(LOW, "waits")
    for claim in (b, d, a):
        me.settle(claim, REQUEUE)
    me.settle(c, Settlement(Action.REDELIVER, b"C"))
    me.take_turn()

    assert database()[LOW] == ["a", "b", "C", "d", "waits"]


@pytest.mark.parametrize("action", Action)
def test_what_is_somebody_elses_by_now_is_not_doubled(me, redis, database, action):
    (claim,) = me.hold("a")
    redis.delete(IN_LOW)
    me.settle(claim, settlement(action))
    me.take_turn()

    assert database() == {TURNS: {"me": "2 T"}}
    assert me.is_settled


def test_what_is_no_claim_of_ours_is_not_settled(me):
    me.settle(Claim(None, b"a broadcast"), ACK)
    me.settle(Claim(None, b"a broadcast"), REQUEUE)

    assert me.to_settle == 0


# -- keys of a wrong type --------------------------------------------------------------------------


@pytest.mark.parametrize("action", MOVES)
def test_a_key_of_a_wrong_type_keeps_the_payload_in_flight_and_the_rest_goes_on(
    me, redis, database, action
):
    first, second = me.hold("a", "b")
    broken = {Action.DELAY: ETA, Action.DEAD: DEAD}.get(action, LOW)
    redis.set(broken, "text")
    redis.rpush(HIGH, "h")
    me.settle(first, settlement(action))
    me.settle(second, ACK)
    claims = me.take_turn(5)

    assert payloads(claims) == ["h"]
    assert me.refused == [(first, settlement(action))]
    assert first.number == 1
    assert database() == {
        broken: "text",
        IN_LOW: {"1": "a"},
        IN_HIGH: {"3": "h"},
        STATS: {"done": "1"},
        TURNS: {"me": "2 T 0:3:1"},
    }


def test_what_was_refused_is_settled_once_the_key_is_mended(me, redis, database):
    first, _ = me.hold("a", "b")
    redis.set(DEAD, "text")
    me.settle(first, settlement(Action.DEAD))
    me.take_turn()
    me.take_turn()
    assert me.claims.keys() == {1, 2}
    redis.delete(DEAD)
    me.retry_refused()
    me.take_turn()

    assert me.claims.keys() == {2}
    assert database() == {
        DEAD: ["A"],
        IN_LOW: {"2": "b"},
        STATS: {"dead": "1"},
        TURNS: {"me": "4 T"},
    }


@pytest.mark.parametrize("broken", [IN_LOW, LOW, HEAD])
def test_a_key_of_a_wrong_type_holds_up_its_own_queue_alone(me, redis, database, broken):
    redis.set(broken, "text")
    redis.rpush(HIGH, "h")
    for key in {LOW, HEAD} - {broken}:
        redis.rpush(key, key)
    claims = me.take_turn(5)

    # What is in the other part of the queue can be claimed, but for where it would be in flight.
    assert payloads(claims)[0] == "h"
    assert len(claims) == (1 if broken == IN_LOW else 2)
    found = database()
    assert found[broken] == "text"
    assert found.get(LOW) == ([LOW] if broken == IN_LOW else "text" if broken == LOW else None)


@pytest.mark.parametrize("action", MOVES)
def test_a_counter_of_a_wrong_type_stops_nothing(me, redis, database, action):
    first, second = me.hold("a", "b")
    redis.set(STATS, "text")
    me.settle(first, settlement(action))
    me.settle(second, ACK)
    me.take_turn()

    assert me.is_settled
    found = database()
    assert found.keys() >= {STATS, TURNS}
    assert IN_LOW not in found
    assert found[STATS] == "text"


def test_in_flight_hashes_of_a_wrong_type_end_no_turn(me, redis):
    first, second, third = me.hold("a", "b", "c")
    redis.set(IN_LOW, "text")
    me.settle(first, ACK)
    me.settle(second, REQUEUE)
    me.settle(third, settlement(Action.RETRY))
    redis.rpush(HIGH, "h")

    assert payloads(me.take_turn(1)) == ["h"]
    assert redis.llen(LOW) == 0


def test_what_is_answered_again_lacks_what_is_gone_and_no_other_queue(me, broker, redis):
    redis.rpush(HIGH, "h")
    redis.rpush(LOW, "a", "b")
    turn = me.turn(3)
    turn.send(broker)
    redis.hdel(IN_LOW, "2")
    assert payloads(turn.send(broker).claims) == ["h", "b"]
    redis.delete(IN_LOW)
    redis.set(IN_LOW, "text")

    assert payloads(turn.send(broker).claims) == ["h"]


def test_a_key_of_a_wrong_type_is_named_in_the_log(me, redis, caplog):
    redis.set(LOW, "text")
    me.take_turn(1)

    assert f"Redis refuses: {LOW}: WRONGTYPE" in caplog.text


# -- servers in trouble ----------------------------------------------------------------------------


@pytest.mark.parametrize("action", Action)
def test_a_server_that_is_full_takes_settlements_and_gives_work(me, redis, database, full, action):
    first, _ = me.hold("a", "b")
    redis.rpush(HIGH, "h")
    me.settle(first, settlement(action))
    with full():
        assert payloads(me.take_turn(1)) == ["h"]

    found = database()
    assert found[IN_LOW] == {"2": "b"}
    assert found[IN_HIGH] == {"3": "h"}
    assert me.claims.keys() == {2, 3}


def test_a_turn_survives_a_flush_of_the_scripts_and_a_restart(make_server):
    server = make_server("--appendonly", "yes", "--appendfsync", "always")
    app = WakaQ(queues=["low"], url=server.url)
    with contextlib.closing(server.client()) as client, contextlib.closing(app.broker) as broker:
        client.rpush(LOW, "a", "b", "c")
        client.hset(TURNS, "me", "0 7")
        me = InFlight(broker, broker.groups[0])
        me.begin(Registered("me", "7"))
        found = []
        for end in (client.script_flush, server.stop, lambda: None):
            turn = me.turn(1)
            found += payloads(me.answered(turn, turn.send(broker)))
            end()
            if server.process is None:
                server.start()

    assert found == ["a", "b", "c"]


def test_a_turn_that_fails_in_its_middle_evicts_and_loses_nothing(me, broker, redis, database):
    first, second = me.hold("a", "b")
    redis.rpush(LOW, "waits")
    me.settle(first, ACK)
    turn = me.turn(5)
    args = [*turn.args, "no operation", 1, second.number]
    with pytest.raises(redis_py.ResponseError):
        broker.run_script("turn", turn.keys, args)

    assert database() == {LOW: ["waits"], IN_LOW: {"2": "b"}, STATS: {"done": "1"}}
    assert broker.run_script("turn", turn.keys, args) is None


# -- sent until it is answered ---------------------------------------------------------------------


class Line(Broker):
    """A broker on a bad line: `loses` says of the next calls whether request or reply is lost."""

    def __init__(self, app):
        super().__init__(app.settings, app.queues)
        self.loses = []
        self.sent = []

    def run_packed(self, name, command):
        self.sent.append((name, command))
        loss = self.loses.pop(0) if self.loses else None
        if loss == "request":
            raise LOST
        reply = super().run_packed(name, command)
        if loss == "reply":
            raise LOST
        return reply


@pytest.fixture
def line(two_queues):
    with contextlib.closing(Line(two_queues)) as line:
        yield line


@pytest.fixture
def insist(line):
    """`insist(request)` sends it until it is answered, and notes pauses and outages."""

    class Insistence:
        def __init__(self):
            self.pauses, self.outages, self.most = [], [], 20

        def __call__(self, request):
            return exchange(request, line, self.pause, self.outages.append)

        def pause(self, seconds):
            self.pauses.append(seconds)
            return len(self.pauses) == self.most

    return Insistence()


@pytest.mark.parametrize("losses", [[], ["request"], ["reply"], ["reply", "request", "reply"]])
def test_after_an_error_the_same_bytes_are_sent_until_they_are_answered(
    me, insist, line, database, losses
):
    (claim,) = me.hold("a")
    line.enqueue(line.queues[1], b"b")
    me.settle(claim, settlement(Action.RETRY))
    line.loses = [*losses]
    turn = me.turn(1)
    claims = me.answered(turn, insist(turn))

    assert payloads(claims) == ["b"]
    assert len(line.sent) == len(losses) + 1
    assert len(set(line.sent)) == 1
    assert insist.outages == [LOST] * len(losses)
    assert database() == {
        LOW: ["A"],
        IN_LOW: {"2": "b"},
        STATS: {"retried": "1"},
        TURNS: {"me": "2 T 1:2:1"},
    }


def test_the_pause_grows_up_to_a_limit(me, insist, line):
    line.loses = ["request"] * 12
    assert isinstance(insist(me.turn(0)), TurnAnswer)

    assert len(insist.pauses) == 12
    assert insist.pauses[0] < 0.1
    assert LONGEST_BACKOFF / 2 <= insist.pauses[-1] <= LONGEST_BACKOFF


def test_who_is_to_give_up_gets_no_answer(me, insist, line):
    line.loses = ["request"] * 100
    insist.most = 5

    assert insist(me.turn(0)) is None
    assert len(line.sent) == 5


@pytest.mark.parametrize("make", [lambda me: me.turn(1), lambda me: me.leave()])
def test_a_refusal_that_does_not_heal_is_an_eviction(me, insist, line, redis, make):
    redis.set(TURNS, "text")
    answer = insist(make(me))

    assert not isinstance(answer, TurnAnswer)
    assert answer is None
    assert len(line.sent) == 3
    assert insist.outages == []


def test_a_registry_that_does_not_heal_is_told(group, insist, redis, line):
    redis.set(TURNS, "text")
    with pytest.raises(Refused, match="WRONGTYPE"):
        insist(Registration(group, lambda _: {}))

    assert len(line.sent) == 3


def test_refusals_that_heal_are_outages_and_evict_nobody(me, insist, line):
    refusals = [
        redis_py.exceptions.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."),
        redis_py.exceptions.ReadOnlyError("You can't write against a read only replica."),
        redis_py.exceptions.BusyLoadingError("Redis is loading the dataset in memory"),
        redis_py.ResponseError("MISCONF Errors writing to the AOF file"),
        redis_py.ResponseError("NOREPLICAS Not enough good replicas to write."),
        redis_py.ResponseError("BUSY Redis is busy running a script."),
        redis_py.exceptions.ClusterDownError("The cluster is down"),
        redis_py.exceptions.TryAgainError("Multiple keys request during rehashing of slot"),
    ]
    answers = [error for error in refusals for _ in range(2)] * 2
    run_packed = line.run_packed

    def refuse(*args):
        if answers:
            raise answers.pop(0)
        return run_packed(*args)

    line.run_packed = refuse
    insist.most = 100

    assert isinstance(insist(me.turn(0)), TurnAnswer)
    assert len(insist.outages) == 4 * len(refusals)


def test_refusals_of_several_kinds_are_counted_each_by_itself(me, insist, line):
    answers = ["WRONGTYPE one", "WRONGTYPE one", "ERR other", "WRONGTYPE one", LOST, "ERR other"]
    run_packed = line.run_packed

    def refuse(*args):
        if answers:
            answer = answers.pop(0)
            raise answer if answer is LOST else redis_py.ResponseError(answer)
        return run_packed(*args)

    line.run_packed = refuse

    assert isinstance(insist(me.turn(0)), TurnAnswer)
