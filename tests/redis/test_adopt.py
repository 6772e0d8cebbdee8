"""Going on under another id: the whole database before and after `adopt`, and what is held then."""

import pytest

from wakaq.store.settlement import ACK, REQUEUE, Action, Settlement
from wakaq.store.turns import Claim

TURNS, REGISTRY = "wakaq:registry:turns", "wakaq:registry:workers"
HIGH, LOW, STATS = "wakaq:high", "wakaq:low", "wakaq:stats:low"
IN_HIGH, IN_LOW = "wakaq:inflight:high:me", "wakaq:inflight:low:me"
NEW_HIGH, NEW_LOW = "wakaq:inflight:high:new", "wakaq:inflight:low:new"


@pytest.fixture(autouse=True)
def entries(redis):
    redis.hset(REGISTRY, mapping={"me": "{}", "new": "{}"})


def test_what_is_held_goes_on_under_new_numbers_and_the_rest_goes_back(me, redis, database):
    claims = me.hold("a", "b", "c", high=["h1", "h2"])
    redis.rpush(LOW, "waits")
    redis.hset(IN_LOW, mapping={"11": "unseen 2", "9": "unseen 1"})
    me.begin_as("new")
    me.take_over()

    assert me.claims == dict(enumerate(claims, 6))
    assert [claim.number for claim in claims] == [6, 7, 8, 9, 10]
    assert me.turn_number == 1
    assert database() == {
        LOW: ["unseen 1", "unseen 2", "waits"],
        NEW_HIGH: {"6": "h1", "7": "h2"},
        NEW_LOW: {"8": "a", "9": "b", "10": "c"},
        TURNS: {"new": "1 T"},
        REGISTRY: {"new": "{}"},
    }


def test_turns_go_on_and_numbers_never_go_back(me, redis, database):
    first, second = me.hold("a", high=["h"])
    redis.hdel(IN_LOW, second.number)
    me.begin_as("new")
    me.take_over()
    redis.rpush(LOW, "b")
    me.settle(first, ACK)
    (claim,) = me.take_turn(1)

    # Past the whole list of what was to be adopted, found or not.
    assert claim.number == 5
    assert database() == {
        NEW_LOW: {"5": "b"},
        "wakaq:stats:high": {"done": "1"},
        TURNS: {"new": "2 T 1:5:1"},
        REGISTRY: {"new": "{}"},
    }


def test_a_new_process_has_nothing_to_adopt(me):
    assert me.adopt(takes_rest=True) is None


def test_who_held_nothing_puts_back_what_its_id_had(me, redis, database):
    redis.hset(IN_LOW, "1", "unseen")
    me.begin_as("new")
    me.take_over()

    assert database() == {LOW: ["unseen"], TURNS: {"new": "1 T"}, REGISTRY: {"new": "{}"}}


@pytest.mark.parametrize("state", [None, "0 8", "2 7"])
def test_who_was_evicted_again_changes_nothing(me, broker, redis, database, state):
    me.hold("a")
    me.begin_as("new")
    redis.hdel(TURNS, "new")
    if state:
        redis.hset(TURNS, "new", state)
    before = database()

    assert me.adopt(takes_rest=True).send(broker) is None
    assert database() == before


def test_who_was_evicted_before_it_adopted_adopts_from_the_id_before(me, database):
    (claim,) = me.hold("a")
    me.begin_as("short-lived")
    me.begin_as("new")
    me.take_over()

    assert claim.number == 2
    found = database()
    assert found[NEW_LOW] == {"2": "a"}
    # The id in between is like anybody's, and is rescued.
    assert found[TURNS] == {"short-lived": "0 7", "new": "1 T"}


@pytest.mark.parametrize("takes_rest", [True, False])
def test_an_adoption_that_is_sent_again_is_answered_again_and_happens_once(
    me, broker, redis, database, takes_rest
):
    me.hold("a", "b", high=["h"])
    redis.hdel(IN_LOW, 2)
    redis.hset(IN_LOW, "9", "unseen")
    me.begin_as("new")
    request = me.adopt(takes_rest=takes_rest)
    answer = request.send(broker)
    before = database()

    assert answer.found == {4: b"h", 6: b"b"}
    for _ in range(2):
        assert request.send(broker) == answer
    assert database() == before


# -- what cannot be adopted ------------------------------------------------------------------------


def test_what_was_settled_unseen_is_not_settled_again(me, broker, database):
    first, second = me.hold("a", "b")
    me.settle(first, ACK)
    me.turn(0).send(broker)  # its answer is lost
    me.begin_as("new")
    me.take_over()
    me.take_turn()

    assert (first.number, second.number) == (0, 4)
    assert database() == {
        NEW_LOW: {"4": "b"},
        STATS: {"done": "1"},
        TURNS: {"new": "2 T"},
        REGISTRY: {"new": "{}"},
    }


def test_what_was_not_settled_is_settled_under_its_new_number(me, database):
    first, second, third = me.hold("a", "b", "c")
    me.settle(first, ACK)
    me.settle(second, Settlement(Action.RETRY, b"B"))
    me.refused.append((third, REQUEUE))
    me.begin_as("new")
    me.take_over()
    me.take_turn()
    assert me.claims == {6: third}
    me.retry_refused()
    me.take_turn()

    assert me.is_settled
    assert database() == {
        LOW: ["c", "B"],
        STATS: {"done": "1", "retried": "1"},
        TURNS: {"new": "3 T"},
        REGISTRY: {"new": "{}"},
    }


def test_what_was_rescued_meanwhile_is_run_to_its_end_and_not_settled(me, redis):
    first, second, third = me.hold("a", "b", "c")
    redis.delete(IN_LOW)
    me.settle(first, ACK)
    me.settle(second, REQUEUE)
    me.refused.append((third, REQUEUE))
    me.begin_as("new")
    me.take_over()

    assert me.is_settled
    assert (me.to_settle, me.refused) == (0, [])
    assert [claim.number for claim in (first, second, third)] == [0, 0, 0]


@pytest.mark.parametrize("takes_rest", [True, False])
def test_a_number_that_means_another_call_is_handed_back(me, redis, database, takes_rest):
    first, second = me.hold("a", "b")
    redis.hset(IN_LOW, first.number, "another")  # as after a failover that forgot the last turns
    me.settle(first, ACK)
    me.begin_as("new")
    me.take_over(takes_rest=takes_rest)
    me.take_turn()

    assert me.claims == {4: second}
    assert first.number == 0
    found = database()
    assert found[LOW] == ["another"]
    assert found[NEW_LOW] == {"4": "b"}
    assert STATS not in found


# -- orphans ---------------------------------------------------------------------------------------


def test_an_orphan_takes_its_own_alone_and_fences_off_its_supervisor(
    me, broker, database, make_process
):
    me.hold("a", "b", "c", high=["h"])
    orphan = make_process()
    claim = Claim(broker.queues[1], b"b", 3)
    orphan.adopts_from("me", [claim])
    orphan.begin_as("new")
    orphan.take_over(takes_rest=False)

    assert orphan.claims == {4: claim}
    assert database() == {
        IN_HIGH: {"1": "h"},
        IN_LOW: {"2": "a", "4": "c"},
        NEW_LOW: {"4": "b"},
        TURNS: {"new": "1 T"},
        # The entry tells rescuers where the rest is.
        REGISTRY: {"me": "{}", "new": "{}"},
    }


def test_orphans_of_one_supervisor_share_what_it_had(me, broker, database, make_process):
    me.hold("a", "b", "c")
    orphans = [make_process(), make_process()]
    for number, orphan in enumerate(orphans, 1):
        claim = Claim(broker.queues[1], b"ab"[number - 1 : number], number)
        orphan.adopts_from("me", [claim])
        orphan.begin_as("new")
        orphan.take_over(takes_rest=False)
        orphan.settle(claim, ACK)
        orphan.take_turn()
        assert orphan.leave().send(broker)

    assert database() == {IN_LOW: {"3": "c"}, STATS: {"done": "2"}, REGISTRY: {"me": "{}"}}


def test_a_turn_of_the_old_id_that_arrives_late_is_refused(
    me, broker, redis, database, make_process
):
    (claim,) = me.hold("a")
    me.settle(claim, ACK)
    late = me.turn(5)  # by a supervisor that dies before it was answered
    orphan = make_process()
    orphan.adopts_from("me", [Claim(broker.queues[1], b"a", 1)])
    orphan.begin_as("new")
    orphan.take_over(takes_rest=False)
    redis.rpush(LOW, "waits")
    before = database()

    assert late.send(broker) is None
    assert database() == before


# -- keys of a wrong type, and servers in trouble --------------------------------------------------


def test_a_queue_of_a_wrong_type_keeps_the_rest_where_rescuers_look(me, redis, database):
    me.hold("a", high=["h"])
    redis.hset(IN_HIGH, "9", "unseen")
    redis.hset(IN_LOW, mapping={"10": "unseen", "11": "unseen"})
    redis.set(LOW, "text")
    me.begin_as("new")
    me.take_over()

    assert database() == {
        HIGH: ["unseen"],
        LOW: "text",
        IN_LOW: {"10": "unseen", "11": "unseen"},
        NEW_HIGH: {"3": "h"},
        NEW_LOW: {"4": "a"},
        TURNS: {"new": "1 T"},
        REGISTRY: {"me": "{}", "new": "{}"},
    }


@pytest.mark.parametrize("broken", [IN_LOW, NEW_LOW])
def test_an_in_flight_hash_of_a_wrong_type_holds_up_its_own_queue_alone(me, redis, broken):
    first, second = me.hold("a", high=["h"])
    redis.delete(broken)
    redis.set(broken, "text")
    me.begin_as("new")
    me.take_over(takes_rest=False)

    assert me.claims == {3: first}
    assert second.number == 0
    assert redis.hgetall(NEW_HIGH) == {b"3": b"h"}
    # What could not be written to its new place was not removed from the old one.
    assert broken == IN_LOW or redis.hgetall(IN_LOW) == {b"2": b"a"}
    assert redis.hexists(REGISTRY, "me")


def test_a_server_that_is_full_still_lets_adopt(me, redis, full, database):
    me.hold("a")
    redis.hset(IN_LOW, "9", "unseen")
    me.begin_as("new")
    with full():
        me.take_over()

    found = database()
    assert found[LOW] == ["unseen"]
    assert found[NEW_LOW] == {"2": "a"}


def test_thousands_are_adopted_and_put_back_at_once(me, redis):
    redis.rpush(LOW, *range(5_000))
    claims = me.take_turn(5_000)
    redis.hset(IN_LOW, mapping={number: number for number in range(5_001, 10_001)})
    me.begin_as("new")
    me.take_over()

    assert [claim.number for claim in claims] == list(range(5_001, 10_001))
    assert redis.hlen(NEW_LOW) == 5_000
    assert [int(one) for one in redis.lrange(LOW, 0, -1)] == list(range(5_001, 10_001))
    assert not redis.exists(IN_LOW)


def test_an_adoption_that_fails_in_its_middle_evicts_and_loses_nothing(me, broker, redis, database):
    me.hold("a")
    redis.hset(IN_LOW, mapping={"x": "no number", "9": "unseen"})
    me.begin_as("new")
    request = me.adopt(takes_rest=True)
    with pytest.raises(Exception, match="nil"):
        request.send(broker)

    found = database()
    assert TURNS not in found
    assert found[IN_LOW] == {"x": "no number", "9": "unseen"}
    assert found[NEW_LOW] == {"2": "a"}
    # Under the next id it is found neither here nor there, and both are rescued.
    assert found[REGISTRY] == {"me": "{}", "new": "{}"}
    assert request.send(broker) is None
