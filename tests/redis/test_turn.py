"""One turn: what it makes of the whole database."""

import pytest

from wakaq.broker import TurnRefused
from wakaq.turn import Claim, Settlement

TURNS, HIGH, LOW = "wakaq:registry:turns", "wakaq:high", "wakaq:low"
HIGH_1, LOW_1 = "wakaq:inflight:high:me:1", "wakaq:inflight:low:me:1"
STATS = "wakaq:stats:low"


@pytest.fixture
def turn(two_queues, redis):
    """Make the third turn of the supervisor `me`, and return what it claims."""
    redis.hset(TURNS, "me", "2")
    return lambda settlements=(), wants=(), fence=(2, 3): two_queues.broker.turn(
        "me", fence, settlements, wants
    )


def after(**others):
    """Return the database with the number of this turn."""
    return {TURNS: {"me": "3"}} | others


def test_an_empty_turn_only_counts(turn, database):
    assert turn() == []
    assert database() == {TURNS: {"me": "3"}}


@pytest.mark.parametrize("fence", [(1, 2), (3, 4), (0, 1)])
def test_a_turn_that_does_not_follow_the_last_one_does_nothing(turn, redis, database, lanes, fence):
    redis.rpush(LOW, "waits")
    redis.rpush(LOW_1, "a")
    before = database()
    with pytest.raises(TurnRefused):
        turn([Settlement(lanes()[1], "done", [b"a"])], [(1, lanes())], fence)

    assert database() == before


def test_a_turn_of_a_supervisor_that_is_not_registered_does_nothing(turn, redis, database, lanes):
    redis.delete(TURNS)
    redis.rpush(LOW, "waits")
    with pytest.raises(TurnRefused):
        turn([], [(1, lanes())])

    assert database() == {LOW: ["waits"]}


def test_a_turn_that_is_repeated_is_refused(turn, redis, lanes):
    redis.rpush(LOW, "a", "b")
    assert len(turn([], [(1, lanes())])) == 1
    with pytest.raises(TurnRefused):
        turn([], [(1, lanes())])

    assert redis.llen(LOW) == 1


def test_an_orphan_needs_no_turn_before(two_queues, redis, database, lanes):
    redis.rpush(LOW_1, "a", "b")
    two_queues.broker.turn("orphan", None, [Settlement(lanes()[1], "done", [b"a"])])

    assert database() == {LOW_1: ["b"], STATS: {"done": "1"}}


@pytest.mark.parametrize(
    ("done", "left"),
    [
        (["a"], ["b", "c"]),
        (["a", "b", "c"], []),
        (["c", "a"], ["b"]),
        (["a", "c"], ["b"]),
        (["gone"], ["a", "b", "c"]),
        (["a", "gone", "c"], ["b"]),
        (["a", "a"], ["b", "c"]),
        (["c", "gone"], ["a", "b"]),
    ],
)
def test_done_acks_what_is_in_flight(turn, redis, lanes, done, left):
    redis.rpush(LOW_1, "a", "b", "c")
    turn([Settlement(lanes()[1], "done", [name.encode() for name in done])])

    count = 3 - len(left)
    assert redis.lrange(LOW_1, 0, -1) == [name.encode() for name in left]
    assert int(redis.hget(STATS, "done") or 0) == count


def test_done_acks_one_of_two_equal_payloads(turn, redis, database, lanes):
    redis.rpush(LOW_1, "a", "b", "a")
    turn([Settlement(lanes()[1], "done", [b"a"])])

    assert database() == after(**{LOW_1: ["b", "a"], STATS: {"done": "1"}})


def test_requeue_puts_back_to_the_front_in_order(turn, redis, database, lanes):
    redis.rpush(LOW, "waits")
    redis.rpush(LOW_1, "a", "b", "c")
    turn([Settlement(lanes()[1], "requeue", [b"b", b"c", b"gone"])])

    assert database() == after(**{LOW: ["b", "c", "waits"], LOW_1: ["a"]})


def test_redeliver_puts_to_the_front_changed(turn, redis, database, lanes):
    redis.rpush(LOW, "waits")
    redis.rpush(LOW_1, "a")
    turn([Settlement(lanes()[1], "redeliver", [b"a"], b"A")])

    assert database() == after(**{LOW: ["A", "waits"], STATS: {"redelivered": "1"}})


def test_retry_puts_to_the_end_changed(turn, redis, database, lanes):
    redis.rpush(LOW, "waits")
    redis.rpush(LOW_1, "a")
    turn([Settlement(lanes()[1], "retry", [b"a"], b"A")])

    assert database() == after(**{LOW: ["waits", "A"], STATS: {"retried": "1"}})


def test_delay_is_due_by_the_servers_clock(turn, redis, database, lanes):
    redis.rpush(LOW_1, "a")
    seconds, micros = redis.time()
    turn([Settlement(lanes()[1], "delay", [b"a"], b"A", 12.5)])

    found = database()
    due = found.pop("wakaq:eta:low")["A"]
    assert 0 <= due - 12.5 - seconds - micros / 1e6 < 1
    assert found == after(**{STATS: {"retried": "1"}})


def test_dead_keeps_the_newest_letters(turn, redis, database, lanes):
    redis.rpush(LOW_1, "a")
    redis.rpush("wakaq:dead:low", "newer", "older")
    turn([Settlement(lanes()[1], "dead", [b"a"], b"letter")])

    assert database() == after(**{"wakaq:dead:low": ["letter", "newer"], STATS: {"dead": "1"}})


@pytest.mark.parametrize("action", ["redeliver", "retry", "delay", "dead"])
def test_what_was_rescued_meanwhile_is_not_doubled(turn, database, lanes, action):
    turn([Settlement(lanes()[1], action, [b"gone"], b"new", 1.0)])

    assert database() == after()


@pytest.mark.parametrize(
    ("want", "claimed"),
    [(1, ["h1"]), (3, ["h1", "h2", "l1"]), (9, ["h1", "h2", "l1", "l2"]), (0, [])],
)
def test_claims_come_by_priority_and_are_in_flight(turn, redis, lanes, want, claimed):
    redis.rpush(HIGH, "h1", "h2")
    redis.rpush(LOW, "l1", "l2")
    claims = turn([], [(want, lanes())])

    high, low = lanes()
    assert [claim.payload.decode() for claim in claims] == claimed
    assert [claim.lane.key for claim in claims] == [
        (high if name[0] == "h" else low).key for name in claimed
    ]
    found = [redis.lrange(key, 0, -1) for key in (HIGH_1, LOW_1, HIGH, LOW)]
    assert b"".join(b"".join(part) for part in found) == b"h1h2l1l2"
    assert sum(map(len, found[:2])) == len(claimed)


def test_each_child_claims_into_its_own_lane(turn, redis, database, lanes):
    redis.rpush(LOW, "a", "b", "c")
    one, two = lanes(1), lanes(2)
    claims = turn([], [(1, one), (1, two)])

    assert claims == [Claim(one[1], b"a"), Claim(two[1], b"b")]
    assert database() == after(**{LOW: ["c"], LOW_1: ["a"], "wakaq:inflight:low:me:2": ["b"]})


def test_settlements_come_before_claims(turn, redis, lanes):
    redis.rpush(LOW_1, "a")
    claims = turn([Settlement(lanes()[1], "requeue", [b"a"])], [(1, lanes())])

    assert [claim.payload for claim in claims] == [b"a"]


def test_payloads_are_opaque_bytes(turn, redis, lanes):
    payloads = [b'{"args": [], "n": 12345678901234567890}', b"\x00\xff", b"", b"x" * 100_000]
    redis.rpush(LOW, *payloads)
    claims = turn([], [(4, lanes())])

    assert [claim.payload for claim in claims] == payloads
    assert redis.lrange(LOW_1, 0, -1) == payloads


@pytest.mark.parametrize(
    "case",
    [
        ("requeue", LOW),
        ("redeliver", LOW),
        ("retry", LOW),
        ("delay", "wakaq:eta:low"),
        ("dead", "wakaq:dead:low"),
    ],
)
def test_a_key_of_a_wrong_type_keeps_the_payload_in_flight_and_the_rest_goes_on(
    turn, redis, database, lanes, case
):
    action, broken = case
    redis.set(broken, "text")
    redis.rpush(LOW_1, "a", "b")
    redis.rpush(HIGH, "h")
    new = b"" if action == "requeue" else b"new"
    claims = turn(
        [Settlement(lanes()[1], action, [b"a"], new), Settlement(lanes()[1], "done", [b"b"])],
        [(5, lanes())],
    )

    assert [claim.payload for claim in claims] == [b"h"]
    assert database() == after(
        **{broken: "text", LOW_1: ["a"], HIGH_1: ["h"], STATS: {"done": "1"}}
    )


@pytest.mark.parametrize("broken", [LOW_1, STATS])
def test_a_lane_or_a_counter_of_a_wrong_type_ends_nothing(turn, redis, database, lanes, broken):
    redis.set(broken, "text")
    redis.rpush(LOW, "waits")
    redis.rpush(HIGH, "h")
    claims = turn([Settlement(lanes()[1], "done", [b"a"])], [(1, lanes()[::-1]), (1, lanes())])

    assert b"h" in [claim.payload for claim in claims]
    assert database()[broken] == "text"
    # Claimed where the lane can take it, else left where it was.
    assert (redis.llen(LOW), database().get(LOW_1)) == (
        (1, "text") if broken == LOW_1 else (0, ["waits"])
    )


def test_a_server_that_is_full_takes_acks_and_gives_work(turn, redis, database, lanes):
    redis.rpush(LOW_1, "a", "b")
    redis.rpush(LOW, "waits")
    redis.config_set("maxmemory", 1)
    try:
        claims = turn(
            [
                Settlement(lanes()[1], "done", [b"a"]),
                Settlement(lanes()[1], "retry", [b"b"], b"B"),
            ],
            [(2, lanes())],
        )
    finally:
        redis.config_set("maxmemory", 0)

    assert [claim.payload for claim in claims] == [b"waits", b"B"]
    assert database() == after(**{LOW_1: ["waits", "B"], STATS: {"done": "1", "retried": "1"}})


def test_a_turn_survives_a_flush_of_the_scripts(turn, redis, lanes):
    redis.rpush(LOW, "a", "b")
    turn([], [(1, lanes())])
    redis.script_flush()

    assert [c.payload for c in turn([], [(1, lanes())], (3, 4))] == [b"b"]


def test_a_key_of_a_wrong_type_is_named_in_the_log(turn, redis, lanes, caplog):
    redis.set(LOW, "text")
    turn([], [(1, lanes())])

    assert f"Redis refuses: {LOW}: WRONGTYPE" in caplog.text
