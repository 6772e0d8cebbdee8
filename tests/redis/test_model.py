"""A model of turns: random histories of all who take part, against the real scripts and server.

Producers, two supervisors, their orphans, wakers and two rescuers take steps in any order, one
command at a time. Requests and replies are lost, requests arrive again much later, supervisors die
or are evicted, keys have wrong types for a while, the server is full, and fails over to one that
forgot the last writes.

After each command the whole database is compared with what it was before:

- Nothing is lost: each payload that was accepted is somewhere in Redis, once, or was acked by
  somebody who had run it, once. What a failover forgot is forgotten here, too.
- Nothing is doubled without a death, an eviction or a forgetful failover: what a supervisor holds
  is what its in-flight hashes have, to the number.
- Order: turns settle and claim as `expect_turn` says; what is put back is in front, in its order.
- Nothing is stranded: each in-flight hash belongs to somebody who is registered, or lives.

In the end all is healed, everybody finishes and leaves, the dead are rescued, and nothing is left.

`pytest tests/redis/test_model.py -m slow` explores for minutes; `--hypothesis-seed=N` elsewhere.
"""

import json
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import pytest
import redis as redis_py
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from wakaq import Queue, WakaQ
from wakaq.message import Call
from wakaq.store.broker import Broker
from wakaq.store.connection import RedisError, is_outage, pack, script
from wakaq.store.registry import Registry, keys_of_entry
from wakaq.store.settlement import ACK, Action, Settlement
from wakaq.store.turns import (
    Adopt,
    AdoptAnswer,
    Claim,
    InFlight,
    Leave,
    Registered,
    Registration,
    Request,
    Turn,
    TurnAnswer,
)

PAGE = 2  # payloads rescued in one call
REMEMBERED = 8  # states that a failover may go back to
LATE = 40  # requests that may arrive again
ALIKE = [b"a", b"b"]  # payloads of equal calls
FRONT = {Action.REQUEUE, Action.REDELIVER}
SCRIPTS = ["adopt", "beat", "fence", "forget", "leave", "promote", "register", "rescue", "turn"]
LOADS_A_SCRIPT = b"*3\r\n$6\r\nSCRIPT\r\n"
TO_THE_END = 60  # steps in which anybody has to come to an end, once all is healed

READ_ALL = """
local found = {}
for i, key in ipairs(redis.call('KEYS', '*')) do
  local kind, value = redis.call('TYPE', key).ok, nil
  if kind == 'list' then value = redis.call('LRANGE', key, 0, -1)
  elseif kind == 'hash' then value = redis.call('HGETALL', key)
  elseif kind == 'zset' then value = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
  else value = {redis.call('GET', key)} end
  found[i] = {key, kind, value}
end
return found
"""


class Fate(Enum):
    """What becomes of a request and its reply."""

    ARRIVES = "arrives"
    REQUEST_LOST = "request lost"
    REPLY_LOST = "reply lost"


PAYLOADS = st.lists(st.sampled_from([None, None, *ALIKE]), min_size=1, max_size=4)  # None: new
FATES = st.sampled_from([*[Fate.ARRIVES] * 6, Fate.REQUEST_LOST, Fate.REPLY_LOST])
INDEX = st.integers(0, 30)
PICKS = st.lists(st.tuples(INDEX, st.sampled_from(Action)), min_size=1, max_size=5)
LATER = st.integers(0, 9) | st.integers(0, LATE - 1)
KEYS = ["queue", "head", "eta", "dead", "stats", "inflight"]
KINDS = st.lists(st.sampled_from(KEYS), min_size=1, max_size=4, unique=True)
QUEUES = st.integers(0, 1)
WANTED = st.integers(0, 5)


def root(payload: bytes) -> bytes:
    """Return what a payload keeps when it is retried, delayed, redelivered or given up."""
    return payload.partition(b";")[0]


# -- the database ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Database:
    """All that is in Redis at a moment."""

    kinds: dict[str, str]
    values: dict[str, Any]

    @classmethod
    def read(cls, connection: Any) -> "Database":
        kinds, values = {}, {}
        for key, kind, value in connection.call(pack("EVAL", READ_ALL, 0)):
            name = key.decode()
            kinds[name] = kind.decode()
            is_table = kind in {b"hash", b"zset"}
            values[name] = dict(zip(value[::2], value[1::2], strict=True)) if is_table else value
        return cls(kinds, values)

    def write(self, client: Any) -> None:
        """Make Redis have this again."""
        pipe = client.pipeline(transaction=False)
        pipe.flushall()
        for key, value in self.values.items():
            match self.kinds[key]:
                case "list":
                    pipe.rpush(key, *value)
                case "hash":
                    pipe.hset(key, mapping=value)
                case "zset":
                    pipe.zadd(key, {member: float(score) for member, score in value.items()})
                case _:
                    pipe.set(key, value[0])
        pipe.execute()

    def is_broken(self, key: str) -> bool:
        return self.kinds.get(key) == "string"

    def elements(self, key: str) -> list[bytes]:
        return self.values[key] if self.kinds.get(key) == "list" else []

    def inflight(self, key: str) -> dict[int, bytes]:
        if self.kinds.get(key) != "hash":
            return {}
        return {int(number): payload for number, payload in sorted(self.values[key].items())}

    def inflight_keys(self) -> list[str]:
        return [k for k in self.kinds if k.startswith("wakaq:inflight:") and not self.is_broken(k)]

    def fields(self, key: str) -> dict[str, bytes]:
        table = {} if self.is_broken(key) else self.values.get(key, {})
        return {name.decode(): value for name, value in table.items()}

    def payloads(self) -> Iterator[bytes]:
        for key, value in self.values.items():
            name = key.removeprefix("aside:")
            if name.startswith(("wakaq:registry", "wakaq:stats")) or self.is_broken(key):
                continue
            yield from value.values() if self.kinds[key] == "hash" else value


# -- who takes part --------------------------------------------------------------------------------


@dataclass(eq=False)
class Run:
    """One execution of a payload by a worker."""

    payload: bytes
    is_done: bool = False


@dataclass(frozen=True)
class Decided:
    """A settlement as a turn carries it."""

    queue: Queue
    number: int
    settlement: Settlement
    run: Run | None  # None: of what nobody runs


@dataclass(eq=False)
class About:
    """What the model knows of a command."""

    what: str
    request: Request | None = None
    supervisor_id: str = ""
    number: int = 0
    token: str = ""
    decided: tuple[Decided, ...] = ()
    base: int = 0
    accepts: bytes = b""  # what a producer sends
    waits_for: str = ""  # the key for which it would block while that is empty


@dataclass(eq=False)
class Process:
    """A supervisor with its workers, or a worker that has lost its supervisor."""

    inflight: InFlight
    is_orphan: bool = False
    takes_rest: bool = True
    runs: dict[Claim, Run] = field(default_factory=dict)
    # What its workers take for their id and numbers until they hear of an adoption.
    heard: tuple[str, dict[Claim, int]] = ("", {})
    request: Request | None = None
    about: About | None = None
    is_registered: bool = False
    is_leaving: bool = False
    is_wiped: bool = False  # from the registry, behind its back
    has_left: bool = False

    def undecided(self) -> list[Claim]:
        return [claim for claim, run in self.runs.items() if claim.number and not run.is_done]


class Line(Broker):
    """A broker on a bad line; a connection to itself."""

    def __init__(self, app: WakaQ, transmit: Callable[[Any, bytes], Any]) -> None:
        super().__init__(app.settings, app.queues)
        self._transmit = transmit

    def connection(self) -> Any:
        return self

    def call(self, command: bytes) -> Any:
        return self._transmit(super().connection(), command)


class World:
    """Redis, those who take part, and the account of what has to be where."""

    def __init__(self, app: WakaQ, client: Any) -> None:
        self.client = client
        client.flushall()
        client.config_set("maxmemory", 0)
        for name in SCRIPTS:  # so that histories do not depend on the ones before
            client.script_load(script(name)[0])
        self.line = Line(app, self.transmit)
        (self.group,) = self.line.groups
        self.registry = Registry(self.line, self.group)
        self.queues = self.group.queues
        self.fate = Fate.ARRIVES
        self.about = About("nothing")
        self.supervisors = [Process(InFlight(self.line, self.group)) for _ in range(2)]
        self.orphans: list[Process] = []
        self.rescues: list[Iterator[None] | None] = [None, None]
        self.late: deque[tuple[bytes, About]] = deque(maxlen=LATE)
        self.is_full = False
        self.has_lost_counts = False  # what was counted while a counter's key was broken
        self.made = 0  # payloads, to tell them apart

        # The account. A failover that forgets the end of it takes these back, too.
        self.accepted: list[bytes] = []  # roots
        self.acked: list[Run] = []
        self.database = Database.read(Broker.connection(self.line))
        self.states: deque[tuple[Database, int, int]] = deque(maxlen=REMEMBERED)

        # Ids as they appeared; those of which something may be doubled; answers by their token.
        self.ids: list[str] = []
        self.disturbed: set[str] = set()
        self.answers: dict[str, tuple[object, ...]] = {}

    # -- one command -------------------------------------------------------------------------------

    def transmit(self, connection: Any, command: bytes) -> Any:
        if command.startswith(LOADS_A_SCRIPT):
            return connection.call(command)
        try:
            if self.fate is Fate.REQUEST_LOST:
                raise redis_py.ConnectionError("request lost")
            reply = self.execute(connection, command, self.about)
        finally:
            if not self.about.accepts:  # a payload that is sent twice is two
                self.late.append((command, self.about))
        if self.fate is Fate.REPLY_LOST:
            raise redis_py.ConnectionError("reply lost")
        return reply

    def execute(self, connection: Any, command: bytes, about: About) -> Any:
        before = self.database
        reply = refusal = None
        try:
            reply = connection.call(command)
        except redis_py.exceptions.NoScriptError:
            raise
        except redis_py.ResponseError as error:
            refusal = error
        self.refresh()
        if self.database != before:
            if about.accepts:
                self.accepted.append(root(about.accepts))
            self.check_acks(before, about)
            self.check_order(before, about)
            self.check_fence(before, about)
            self.remember()
        self.check_conservation(about)
        self.check_protocol(before, about, reply)
        if refusal:
            raise refusal
        return reply

    def refresh(self) -> None:
        before = self.database
        self.database = Database.read(Broker.connection(self.line))
        for key in (self.group.turns, self.group.registry):
            known = self.database.fields(key)
            self.ids += [one for one in known if one not in self.ids]
        turns = self.database.fields(self.group.turns)
        self.disturbed |= before.fields(self.group.turns).keys() - turns.keys()

    def remember(self) -> None:
        if any(one.is_wiped for one in self.processes()):
            self.states.clear()  # what is nobody's by an operator's hand and a failover, stays so
        self.states.append((self.database, len(self.accepted), len(self.acked)))

    # -- what has to be true after a command -------------------------------------------------------

    def check_acks(self, before: Database, about: About) -> None:
        """Only what was run is acked, once."""
        for one in about.decided:
            key = self.line.keys.of(one.queue).inflight + about.supervisor_id
            payload = before.inflight(key).get(one.number)
            is_gone = payload is not None and one.number not in self.database.inflight(key)
            if is_gone and one.settlement.action is Action.ACK:
                assert one.run is not None
                assert one.run.is_done
                assert one.run.payload == payload
                assert one.run not in self.acked
                self.acked.append(one.run)

    def check_fence(self, before: Database, about: About) -> None:
        """Whoever takes from the in-flight hash of another id evicts that."""
        turns = self.database.fields(self.group.turns)
        for key in before.inflight_keys():
            owner = key.rpartition(":")[2]
            is_taken_from = before.inflight(key).keys() - self.database.inflight(key).keys()
            if is_taken_from and owner != about.supervisor_id:
                assert owner not in turns, about.what

    def check_conservation(self, about: About) -> None:
        found = Counter(root(payload) for payload in self.database.payloads())
        found.update(root(run.payload) for run in self.acked)
        assert found == Counter(self.accepted), about.what

    def check_order(self, before: Database, about: About) -> None:
        """What is put back is in front of its queue, the lowest number or the first due foremost.

        For turns, see `expect_turn`.
        """
        for queue in self.queues:
            of = self.line.keys.of(queue)
            waited, waits = before.elements(of.queue), self.database.elements(of.queue)
            moved = waits[: len(waits) - len(waited)]
            match about.what:
                case "adopt" | "rescue":
                    # Of what has left the in-flight hashes, some may have been adopted.
                    left = map(root, self.has_left(before, of.inflight))
                    assert all(root(payload) in left for payload in moved), (about.what, moved)
                case "promote":
                    delayed = before.fields(of.eta).items()
                    due = [
                        one.encode() for one, at in sorted(delayed, key=lambda one: float(one[1]))
                    ]
                    assert moved == due[: len(moved)]
                case "leave" | "forget" | "wake" | "put back":
                    waited = before.elements(of.head) + waited
                    waits = self.database.elements(of.head) + waits
                    moved = []
                case _:
                    continue
            assert waits == moved + waited, about.what

    def has_left(self, before: Database, inflight: str) -> list[bytes]:
        """Return what has left a queue's in-flight hashes, by number."""
        left: list[bytes] = []
        for key in before.inflight_keys():
            if key.startswith(inflight):
                gone = before.inflight(key).keys() - self.database.inflight(key).keys()
                left += [before.inflight(key)[number] for number in sorted(gone)]
        return left

    def check_protocol(self, before: Database, about: About, reply: Any) -> None:
        """A request of a supervisor is executed if it is its next one, else nothing happens."""
        if about.number == 0:
            return
        state = before.fields(self.group.turns).get(about.supervisor_id, b"").split()
        is_next = state[:2] == [b"%d" % (about.number - 1), about.token.encode()]
        is_again = bool(state) and state[0] == b"%d" % about.number
        if not is_next:
            assert self.database == before, about.what
            assert is_again == (reply is not None) or about.what == "leave", about.what
            return
        assert reply is not None, about.what
        if isinstance(about.request, Turn):
            claims = self.expect_turn(before, about)
            answer = about.request._read(reply)
            assert [(c.queue, c.number, c.payload) for c in answer.claims] == claims
            assert answer.token not in self.answers
            self.answers[answer.token] = self.summary(answer)

    @staticmethod
    def summary(answer: TurnAnswer) -> tuple[object, ...]:
        claims = [(claim.queue, claim.number, claim.payload) for claim in answer.claims]
        return claims, answer.failed

    def expect_turn(self, before: Database, about: About) -> list[tuple[Queue, int, bytes]]:
        """Check what a turn has made of lists and in-flight hashes; return what it has to claim."""
        assert isinstance(about.request, Turn)
        wanted, number, claims = about.request.wanted, about.base, []
        for queue in self.queues:
            of = self.line.keys.of(queue)
            key = of.inflight + about.supervisor_id
            held, front, back = before.inflight(key), {}, []
            for one in about.decided:
                action = one.settlement.action
                targets = {Action.ACK: "", Action.DELAY: of.eta, Action.DEAD: of.dead}
                if one.queue is not queue or one.number not in held:
                    continue
                if before.is_broken(targets.get(action, of.queue)):
                    continue
                payload = held.pop(one.number)
                if action in FRONT:
                    front[one.number] = one.settlement.payload or payload
                elif action is Action.RETRY:
                    back.append(one.settlement.payload)
            head = before.elements(of.head)
            waiting = [front[n] for n in sorted(front)] + before.elements(of.queue) + back
            taken = 0 if before.is_broken(key) else min(wanted, len(head) + len(waiting))
            for payload in (head + waiting)[:taken]:
                held[number] = payload
                claims.append((queue, number, payload))
                number += 1
            wanted -= taken
            from_head = min(taken, len(head))
            assert self.database.inflight(key) == held
            assert self.database.elements(of.head) == head[from_head:]
            assert self.database.elements(of.queue) == waiting[taken - from_head :]
        return claims

    # -- what has to be true after a step ----------------------------------------------------------

    def check_holders(self) -> None:
        """What a supervisor holds is what its in-flight hashes have, unless it was evicted."""
        for process in self.processes():
            inflight = process.inflight
            is_known = process.is_registered and inflight.adopt(takes_rest=True) is None
            if not is_known or inflight.supervisor_id in self.disturbed:
                continue
            if isinstance(process.request, Registration | Adopt):
                continue
            has = {}
            for key in self.database.inflight_keys():
                if key.rpartition(":")[2] == inflight.supervisor_id:
                    has |= self.database.inflight(key)
            holds = {number: claim.payload for number, claim in inflight.claims.items()}
            if isinstance(process.request, Turn):  # which may have been executed, or not
                assert process.about
                settled = {one.number for one in process.about.decided}
                base = process.about.base
                has = {n: p for n, p in has.items() if n < base and n not in settled}
                holds = {n: p for n, p in holds.items() if n not in settled}
            assert has == holds, inflight.supervisor_id

    def check_owners(self) -> None:
        """Each in-flight hash belongs to somebody who is registered, or to a process that lives."""
        owners = self.database.fields(self.group.turns).keys()
        owners |= self.database.fields(self.group.registry).keys()
        for process in self.processes():
            owners |= {process.inflight.supervisor_id, process.inflight._former_id}
        for key in self.database.inflight_keys():
            assert key.rpartition(":")[2] in owners, key

    # -- processes ---------------------------------------------------------------------------------

    def processes(self) -> list[Process]:
        return [one for one in (*self.supervisors, *self.orphans) if not one.has_left]

    def start(self) -> None:
        """Begin a supervisor where there is none."""
        place = [one.has_left for one in self.supervisors].index(True)
        self.supervisors[place] = Process(InFlight(self.line, self.group))

    def make_entry(self, supervisor_id: str) -> dict[str, Any]:
        return self.registry.new_entry(supervisor_id, 0, 1)

    def send(self, fate: Fate, about: About, call: Callable[[], Any]) -> Any:
        """Let a request meet its fate.

        Raises:
            redis.RedisError: It is not known to have arrived, or was refused.
        """
        self.fate, self.about = fate, about
        try:
            return call()
        finally:
            self.fate, self.about = Fate.ARRIVES, About("nothing")

    def step(self, process: Process, wanted: int, fate: Fate) -> None:
        """Send what a process has to send, for the first time or again."""
        if process.request is None:
            self.make_request(process, wanted)
        request, about = process.request, process.about
        assert request
        assert about
        try:
            answer = self.send(fate, about, lambda: request.send(self.line))
        except RedisError as error:
            if not is_outage(error):
                raise
            return
        process.request = process.about = None
        self.take_answer(process, request, answer)

    def make_request(self, process: Process, wanted: int) -> None:
        inflight = process.inflight
        about = About("register")
        request: Request
        if not process.is_registered:
            request = Registration(self.group, self.make_entry)
        else:
            adopt = inflight.adopt(takes_rest=process.takes_rest)
            if adopt:
                request, about.what = adopt, "adopt"
            elif process.is_leaving and inflight.is_settled:
                request, about.what = inflight.leave(), "leave"
            else:
                can_claim = not (process.is_orphan or process.is_leaving)
                request, about.what = inflight.turn(wanted if can_claim else 0), "turn"
                about.decided = tuple(
                    Decided(claim.queue, claim.number, settlement, process.runs.get(claim))
                    for claim, settlement in (
                        *inflight.settlements,
                        *((claim, ACK) for claim in inflight.done),
                    )
                )
            about.supervisor_id = inflight.supervisor_id
            about.number, about.token = inflight._number + 1, inflight._token
            about.base = inflight._next_claim
        about.request = request
        process.request, process.about = request, about

    def take_answer(self, process: Process, request: Request, answer: Any) -> None:
        inflight = process.inflight
        match request, answer:
            case Registration(), Registered():
                inflight.begin(answer)
                process.is_registered = True
            case Adopt(), AdoptAnswer():
                numbers = {claim: claim.number for claim in process.runs if claim.number}
                process.heard = inflight._former_id, numbers
                inflight.adopted(request, answer)
                process.takes_rest = True  # of an id that is ours alone
            case Turn(), TurnAnswer():
                assert self.summary(answer) == self.answers[answer.token]
                for claim in inflight.answered(request, answer):
                    process.runs[claim] = Run(claim.payload)
                process.is_wiped = False
            case Leave(), True:
                process.has_left = True
            case (Registration(), None) | (Leave(), False):
                pass
            case _, None:
                process.is_registered = False
            case _:
                raise AssertionError((request, answer))

    def settle(self, process: Process, claim: Claim, action: Action) -> None:
        start = root(claim.payload)
        self.made += 1
        new = {
            Action.RETRY: start + b";r",
            Action.REDELIVER: start + b";x",
            Action.DELAY: start + b";d%d" % self.made,  # as ours, which equal no other
            Action.DEAD: start + b";dead",
        }
        process.runs[claim].is_done = True
        process.inflight.settle(claim, Settlement(action, new.get(action, b"")))

    def die(self, process: Process, hands: int, *, is_stale: bool) -> None:
        """End a process; what its workers run is settled by them, or by nobody."""
        inflight = process.inflight
        former_id = inflight._former_id or inflight.supervisor_id
        self.disturbed |= {former_id, inflight.supervisor_id}
        numbers = {claim: claim.number for claim in process.undecided()}
        if is_stale and process.heard[0]:
            former_id, heard = process.heard
            numbers = {claim: heard[claim] for claim in numbers if claim in heard}
        process.has_left = True
        parts: list[list[Claim]] = [[], [], []]
        runs = {}
        for claim, number in numbers.items():
            copy = Claim(claim.queue, claim.payload, number)
            parts[hands % 3].append(copy)
            runs[copy] = process.runs[claim]
            hands //= 3
        if process.is_orphan:
            return
        for part in parts[:2]:
            if part:
                orphan = Process(InFlight(self.line, self.group), is_orphan=True, takes_rest=False)
                orphan.inflight.adopts_from(former_id, part)
                orphan.runs = {claim: runs[claim] for claim in part}
                orphan.is_leaving = True
                self.orphans.append(orphan)

    # -- rescuers ----------------------------------------------------------------------------------

    def rescue(self, target: str, fates: Callable[[], Fate]) -> Iterator[None]:
        """Rescue one id, with a pause before each command."""

        def insist(what: str, call: Callable[[], Any]) -> Iterator[None]:
            while True:
                yield
                try:
                    return self.send(fates(), About(what), call)
                except redis_py.ConnectionError:
                    pass

        entry = self.registry.entries().get(target)
        turn = self.registry.turns().get(target, b"")
        of = keys_of_entry(json.loads(entry)) if entry else None
        keys = of or self.registry.own_keys(target)
        if not (yield from insist("fence", lambda: self.registry.fence(target, turn))):
            return
        try:
            for one in keys:
                numbers = self.registry.inflight(one)
                yield
                for start in reversed(range(0, len(numbers), PAGE)):
                    part = numbers[start : start + PAGE]
                    found = zip(part, self.registry.payloads(one, part), strict=True)
                    page = [(n, p, root(p) + b";x") for n, p in found if p is not None]
                    call = lambda one=one, page=page: self.registry.rescue(target, one, page)  # noqa: E731
                    yield from insist("rescue", call)
        except redis_py.ResponseError:  # a key of a wrong type, or a full server
            return
        yield from insist("forget", lambda: self.registry.forget(target, keys))

    # -- faults ------------------------------------------------------------------------------------

    def fail_over(self, forgotten: int) -> None:
        """Go on with a server that has not seen the last writes."""
        if len(self.states) <= forgotten or any(one.is_wiped for one in self.processes()):
            return
        for _ in range(forgotten):
            self.states.pop()
        database, accepted, acked = self.states[-1]
        self.client.config_set("maxmemory", 0)
        database.write(self.client)
        self.client.config_set("maxmemory", int(self.is_full))
        del self.accepted[accepted:]
        del self.acked[acked:]
        self.disturbed |= set(self.ids)
        self.refresh()
        assert self.database == database

    def wipe(self) -> None:
        """Take those who live off the registry, behind their backs."""
        broken = [key for key in self.database.kinds if self.database.is_broken(key)]
        own = [one for one in self.processes() if one.takes_rest and one.inflight.supervisor_id]
        # An id that was wiped is known to its process alone, until that has adopted from it.
        if broken or any(isinstance(one.request, Adopt) for one in own):
            return
        for process in own:
            for one in {process.inflight.supervisor_id, process.inflight._former_id} - {""}:
                self.client.hdel(self.group.turns, one)
                self.client.hdel(self.group.registry, one)
                self.disturbed.add(one)
            process.is_wiped = True
        self.states.clear()
        self.refresh()

    def break_key(self, key: str) -> None:
        """Have a key be of a wrong type for a while; what it had comes back."""
        if self.database.is_broken(key) or any(one.is_wiped for one in self.processes()):
            return
        if key in self.database.kinds:
            if ":inflight:" in key:
                return
            self.client.rename(key, f"aside:{key}")
        self.has_lost_counts |= ":stats:" in key
        self.client.config_set("maxmemory", 0)
        self.client.set(key, "text")
        self.client.config_set("maxmemory", int(self.is_full))
        self.refresh()
        self.remember()

    def heal(self) -> None:
        for key, kind in self.database.kinds.items():
            if kind == "string":
                self.client.delete(key)
                if f"aside:{key}" in self.database.kinds:
                    self.client.rename(f"aside:{key}", key)
        self.refresh()
        self.remember()

    def fill(self, *, is_full: bool) -> None:
        self.is_full = is_full
        self.client.config_set("maxmemory", int(is_full))

    # -- the end -----------------------------------------------------------------------------------

    def end(self) -> None:
        """Heal all, let everybody finish, and look whether anything is left."""
        self.fill(is_full=False)
        self.heal()
        self.finish()
        for rescue in filter(None, self.rescues):
            for _ in rescue:
                pass
        for _ in range(TO_THE_END):
            dead = self.database.fields(self.group.turns).keys()
            dead |= self.database.fields(self.group.registry).keys()
            if not dead:
                break
            for target in sorted(dead, key=self.ids.index):
                for _ in self.rescue(target, lambda: Fate.ARRIVES):
                    pass
        self.drain()
        left = set(self.database.kinds)
        assert not {key for key in left if not key.startswith(("wakaq:dead:", "wakaq:stats:"))}
        stats = [self.database.fields(f"wakaq:stats:{queue.name}") for queue in self.queues]
        done = sum(int(one.get("done", 0)) for one in stats)
        assert done == len(self.acked) or self.has_lost_counts

    def finish(self) -> None:
        for process in self.processes():
            process.is_leaving = True
            for _ in range(TO_THE_END):
                if process.has_left:
                    break
                process.inflight.retry_refused()
                for claim in process.undecided():
                    self.settle(process, claim, Action.ACK)
                self.step(process, 0, Fate.ARRIVES)
                self.check_holders()
            assert process.has_left

    def drain(self) -> None:
        process = self.supervisors[0] = Process(InFlight(self.line, self.group))
        self.line.promote(self.group, 1_000)
        self.refresh()
        for _ in range(TO_THE_END):
            waiting = [key for key in self.database.kinds if self.database.kinds[key] == "list"]
            if process.is_registered and not [k for k in waiting if ":dead:" not in k]:
                break
            for claim in process.undecided():
                self.settle(process, claim, Action.ACK)
            self.step(process, 50, Fate.ARRIVES)
            self.check_holders()
        self.finish()


@contextmanager
def suppress_expected() -> Iterator[None]:
    """Let pass what a caller has to live with: an outage, or a key of a wrong type."""
    try:
        yield
    except redis_py.RedisError as error:
        is_unknown = isinstance(error, redis_py.exceptions.NoScriptError)
        if not (is_outage(error) or is_unknown or "WRONGTYPE" in str(error)):
            raise


# -- the rules -------------------------------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """Histories of such a world."""

    steps = 0  # of all histories

    def __init__(self, app: WakaQ, client: Any) -> None:
        super().__init__()
        self.world = World(app, client)
        self.next_fate = Fate.ARRIVES

    @initialize(payloads=st.lists(PAYLOADS, min_size=2, max_size=2), wanted=WANTED)
    def begin(self, payloads, wanted):
        """Have two supervisors that serve, and something for them to do."""
        for queue, some in enumerate(payloads):
            self.enqueue(queue, some, Fate.ARRIVES)
        for process in self.world.supervisors:
            for _ in range(2):
                self.world.step(process, wanted, Fate.ARRIVES)

    # -- producers, wakers, promoters --------------------------------------------------------------

    @rule(queue=QUEUES, payloads=PAYLOADS, fate=FATES)
    def enqueue(self, queue, payloads, fate):
        world = self.world
        for payload in payloads:
            world.made += 1
            new = payload or b"u%d" % world.made
            call = lambda new=new: world.line.enqueue(world.queues[queue], new)  # noqa: E731
            self.attempt(fate, About("enqueue", accepts=new), call)

    @rule(queue=QUEUES)
    def delay(self, queue):
        world = self.world
        of = world.line.keys.of(world.queues[queue])
        if world.is_full or world.database.is_broken(of.eta):
            return
        world.made += 1
        payload = b"u%d" % world.made
        world.line.enqueue_all([Call(world.queues[queue], payload, at=1.0)])
        world.accepted.append(payload)
        world.refresh()
        world.remember()

    def some_in(self, kind):
        keys = self.world.line.keys
        here = [getattr(keys.of(queue), kind) for queue in self.world.queues]
        return bool(self.world.database.kinds.keys() & here)

    @precondition(lambda self: self.some_in("queue"))
    @rule(queue=QUEUES, fate=FATES)
    def wake(self, queue, fate):
        world, one = self.world, self.world.queues[queue]
        about = About("wake", waits_for=world.line.keys.of(one).queue)
        if about.waits_for in world.database.kinds:
            self.attempt(fate, about, lambda: world.line.wait_for_work(one))

    @precondition(lambda self: self.some_in("head"))
    @rule(queue=QUEUES, fate=FATES)
    def put_head_back(self, queue, fate):
        world, one = self.world, self.world.queues[queue]
        self.attempt(fate, About("put back"), lambda: world.line.put_head_back(one))

    @precondition(lambda self: self.some_in("eta"))
    @rule(limit=st.integers(1, 5), fate=FATES)
    def promote(self, limit, fate):
        world = self.world
        self.attempt(fate, About("promote"), lambda: world.line.promote(world.group, limit))

    def attempt(self, fate, about, call):
        """Do what nobody repeats."""
        with suppress_expected():
            self.world.send(fate, about, call)

    # -- supervisors and orphans -------------------------------------------------------------------

    def process(self, index):
        processes = self.world.processes()
        return processes[index % len(processes)]

    def some_live(self):
        return bool(self.world.processes())

    @precondition(lambda self: any(one.has_left for one in self.world.supervisors))
    @rule()
    def start(self):
        self.world.start()

    @precondition(some_live)
    @rule(index=INDEX, wanted=WANTED, fates=st.lists(FATES, min_size=1, max_size=4))
    def step(self, index, wanted, fates):
        process = self.process(index)
        for fate in fates:
            if not process.has_left:
                self.world.step(process, wanted, fate)

    @precondition(some_live)
    @rule(index=INDEX, picks=PICKS, wanted=WANTED, fate=FATES)
    def settle(self, index, picks, wanted, fate):
        process = self.process(index)
        if process.request is None:
            process.inflight.retry_refused()
        for pick, action in picks:
            if claims := process.undecided():
                self.world.settle(process, claims[pick % len(claims)], action)
        self.world.step(process, wanted, fate)

    @precondition(some_live)
    @rule(index=INDEX, fate=FATES)
    def beat(self, index, fate):
        world, supervisor_id = self.world, self.process(index).inflight.supervisor_id
        if supervisor_id:
            entry = world.make_entry(supervisor_id)
            self.attempt(fate, About("beat"), lambda: world.registry.beat(supervisor_id, entry))

    @precondition(some_live)
    @rule(index=INDEX)
    def leave(self, index):
        process = self.process(index)
        process.is_leaving = True
        for claim in process.undecided():
            self.world.settle(process, claim, Action.ACK)

    @precondition(some_live)
    @rule(index=INDEX, hands=st.integers(0, 3**8 - 1), is_stale=st.booleans())
    def die(self, index, hands, is_stale):
        process = self.process(index)
        if not process.is_wiped:
            self.world.die(process, hands, is_stale=is_stale)

    # -- rescuers ----------------------------------------------------------------------------------

    @precondition(lambda self: self.world.ids)
    @rule(who=st.integers(0, 1), index=INDEX, fates=st.lists(FATES, min_size=1, max_size=6))
    def rescue(self, who, index, fates):
        """Go on with a rescue, or begin one, of anybody."""
        world = self.world
        if world.rescues[who] is None:
            holders = {key.rpartition(":")[2] for key in world.database.inflight_keys()}
            targets = [one for one in world.ids if one in holders] + world.ids[-2:]
            target = targets[index % len(targets)]
            world.rescues[who] = world.rescue(target, lambda: self.next_fate)
        for fate in fates:
            self.next_fate = fate
            rescue = world.rescues[who]
            if rescue and next(rescue, "ended") == "ended":
                world.rescues[who] = None

    # -- faults ------------------------------------------------------------------------------------

    @precondition(lambda self: self.world.late)
    @rule(indexes=st.lists(LATER, min_size=1, max_size=3))
    def arrive_late(self, indexes):
        """Have the server execute requests of before, counted from the last."""
        world = self.world
        sent = list(world.late)
        for index in indexes:
            command, about = sent[-1 - index % len(sent)]
            if not about.waits_for or about.waits_for in world.database.kinds:
                with suppress_expected():
                    world.execute(Broker.connection(world.line), command, about)

    @precondition(lambda self: self.world.late)
    @rule(forgotten=st.integers(1, REMEMBERED - 1), then=st.lists(LATER, max_size=3))
    def fail_over(self, forgotten, then):
        self.world.fail_over(forgotten)
        self.arrive_late(then)

    @rule(queue=QUEUES, kinds=KINDS)
    def break_keys(self, queue, kinds):
        world = self.world
        for kind in kinds:
            key = getattr(world.line.keys.of(world.queues[queue]), kind)
            world.break_key(key if kind != "inflight" else key + world.ids[-1])

    @rule(kind=st.sampled_from(["heal", "full", "wipe", "scripts"]))
    def afflict(self, kind):
        match kind:
            case "heal":
                self.world.fill(is_full=False)
                self.world.heal()
            case "full":
                self.world.fill(is_full=True)
            case "wipe":
                self.world.wipe()
            case "scripts":
                self.world.client.script_flush()

    # -- what has to be true -----------------------------------------------------------------------

    @invariant()
    def holders_hold_what_redis_has(self):
        Machine.steps += 1
        self.world.check_holders()

    @invariant()
    def nothing_is_stranded(self):
        self.world.check_owners()

    def teardown(self):
        self.next_fate = Fate.ARRIVES
        self.world.end()


def explore(app: WakaQ, client: Any, histories: int, steps: int, *, is_same: bool) -> int:
    """Play so many histories; return how many steps that were."""
    Machine.steps = 0
    options = settings(
        max_examples=histories,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        derandomize=is_same,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(lambda: Machine(app, client), settings=options)
    return Machine.steps


@pytest.fixture
def app(app_url):
    app = WakaQ(queues=["high", "low"], url=app_url, wait_timeout=0.001)
    with closing(app.broker):
        yield app


@pytest.fixture
def client(redis):
    yield redis
    redis.config_set("maxmemory", 0)


@pytest.mark.timeout(600)  # a history that fails is made short, which takes a while
def test_nothing_is_lost_or_doubled_in_some_histories(app, client):
    explore(app, client, 40, 50, is_same=True)


@pytest.mark.slow
@pytest.mark.timeout(3_600)
def test_nothing_is_lost_or_doubled_in_50_000_steps(app, client):
    assert explore(app, client, 1_500, 60, is_same=False) >= 50_000
