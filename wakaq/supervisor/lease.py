"""Watches the other supervisors, and rescues what the dead ones had in flight.

Renews this one's entry, for people.

A supervisor's proof of life is the number of its last turn. No clocks of two machines are compared:
an observer counts only time in which it had Redis itself and the other's number stood still. So an
outage, or a failover, never makes live supervisors rob each other. What this process was itself
under former ids is watched like any other.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from wakaq.app import WakaQ
from wakaq.service import REGISTRY_UNUSABLE, Outage, Service, give_up
from wakaq.store.broker import Broker
from wakaq.store.connection import RedisError, is_outage
from wakaq.store.keys import OLD_TOMBSTONE
from wakaq.store.registry import EntryKeys, Registry, is_alive, keys_of_entry, read_entry
from wakaq.supervisor.old_release import OldRelease
from wakaq.worker.outcome import rescued

logger = logging.getLogger("wakaq.supervisor")

TERM = 15.0  # seconds without a turn after which a supervisor is declared dead
BEAT = 3.0  # seconds between looks at the others
# Seconds that the workers of a dead supervisor of this host have to adopt what they run.
ADOPTED_WITHIN = 1.0
REFUSALS = 3  # in a row of the registry, after which this supervisor is no use
PAGE = 100  # payloads rescued in one call

_Key = tuple[str, str]  # of a registry, and a supervisor's id


@dataclass(frozen=True)
class Identity:
    """What this supervisor is in one slot group, just now."""

    registry: Registry
    supervisor_id: str
    former_id: str  # from which it is about to adopt, so that nobody here is to rescue that
    turn_number: int


@dataclass(frozen=True)
class _Observed:
    """What was seen of another supervisor, and for how many seconds that has not changed."""

    proof: object
    still: float = 0.0
    gone: float | None = None  # since its process was seen to be gone; None: it was not

    def then(self, proof: object, *, is_gone: bool, passed: float) -> "_Observed":
        """Return what is known after another look."""
        still = self.still + passed if proof == self.proof else 0.0
        gone = 0.0 if self.gone is None else self.gone + passed
        return _Observed(proof, still, gone if is_gone else None)


class Lease(Service):
    """The thread. `describe` returns what the workers do, as JSON can hold it."""

    def __init__(
        self,
        app: WakaQ,
        identities: Callable[[], Sequence[Identity]],
        describe: Callable[[], list[dict[str, Any]]],
        outage: Outage,
        term: float = TERM,
    ) -> None:
        super().__init__(outage)
        self.interval = self.longest_pause = min(BEAT, term / 5)
        self._identities = identities
        self._describe = describe
        self._term = term
        self._concurrency = app.settings.concurrency
        # One call that is left without an answer must not keep this thread from noticing others'
        # deaths.
        settings, most = app.settings, term / 3
        settings = replace(
            settings,
            socket_timeout=min(settings.socket_timeout, most),
            socket_connect_timeout=min(settings.socket_connect_timeout, most),
        )
        self._broker = Broker(settings, app.queues)
        self._old_release = OldRelease(app, self._broker)
        # This thread only.
        self._last_tick: float | None = None  # None after one that failed
        self._observed: dict[_Key, _Observed] = {}
        self._declared: set[str] = set()  # ids of the dead that were told of
        self._refusals = 0  # in a row

    def tick(self, now: float) -> float | None:
        last_tick, self._last_tick = self._last_tick, None
        # Time counts only if Redis answered at both its ends, and if we were not stopped ourselves
        # in between. Otherwise the observation starts anew, but for what is looked at for an hour.
        if last_tick is None or now - last_tick > 2 * self.interval:
            last_tick = now
            self._observed = {
                key: seen
                for key, seen in self._observed.items()
                if key[1].startswith(OLD_TOMBSTONE)
            }
        observed: dict[_Key, _Observed] = {}
        for identity in self._identities():
            registry = Registry(self._broker, identity.registry.group)
            try:
                host = self._renew(registry, identity)
                own = {identity.supervisor_id, identity.former_id}
                observed |= self._watch(registry, own, host, now - last_tick)
            except RedisError as error:
                if is_outage(error):
                    raise
                self._note_refusal(registry, error)
            else:
                self._refusals = 0
        self._observed = observed
        self._declared &= {supervisor_id for _, supervisor_id in observed}
        self._outage.end(now)
        self._last_tick = now
        is_due_soon = any(seen.gone is not None for seen in observed.values())
        return min(self.interval, ADOPTED_WITHIN) if is_due_soon else None

    def _renew(self, registry: Registry, identity: Identity) -> str:
        """Renew this supervisor's entry; returns its host."""
        entry = registry.new_entry(
            identity.supervisor_id,
            identity.turn_number,
            self._concurrency,
            children=self._describe(),
        )
        registry.beat(identity.supervisor_id, entry)
        return str(entry["same_host"])

    def _note_refusal(self, registry: Registry, error: RedisError) -> None:
        """Note that a key of the registry cannot be used; end the process if that stays so."""
        names = f"{registry.group.registry} or {registry.group.turns}"
        self._broker.report_refusal(f"{names}: {error}")
        self._refusals += 1
        if self._refusals >= REFUSALS:
            give_up(f"Redis refuses to keep this supervisor in {names}: {error}", REGISTRY_UNUSABLE)

    def _watch(
        self, registry: Registry, own: set[str], host: str, passed: float
    ) -> dict[_Key, _Observed]:
        """Look at the others, and rescue from those that are dead; returns what was seen."""
        entries, turns = registry.entries(), registry.turns()
        found: dict[_Key, _Observed] = {}
        for supervisor_id in entries.keys() | turns.keys():
            if supervisor_id in own:
                continue
            other = _Other(supervisor_id, entries.get(supervisor_id), turns.get(supervisor_id))
            key = registry.group.registry, supervisor_id
            is_gone = other.is_gone_from(host)
            before = self._observed.get(key)
            if before is None:
                seen = _Observed(other.proof, gone=0.0 if is_gone else None)
                if other.is_garbage:
                    logger.warning(
                        "The registry's entry %s is no supervisor's: %r", supervisor_id, other.raw
                    )
            else:
                seen = before.then(other.proof, is_gone=is_gone, passed=passed)
            found[key] = seen
            self._judge(registry, other, seen, passed)
        return found

    def _judge(self, registry: Registry, other: "_Other", seen: _Observed, passed: float) -> None:
        if other.supervisor_id.startswith(OLD_TOMBSTONE):
            self._judge_tombstone(registry, other, seen, passed)
        elif seen.still >= self._term:
            self._declare(other, f"has not moved for {seen.still:.0f} s: it is dead")
            self.rescue(registry, other)
        elif seen.gone is not None and seen.gone >= ADOPTED_WITHIN:
            self._declare(other, "of this host is gone")
            self.rescue(registry, other)

    def _judge_tombstone(
        self, registry: Registry, other: "_Other", seen: _Observed, passed: float
    ) -> None:
        field = other.supervisor_id
        if other.keys is None:
            self._old_release.look_again(registry, field, other.raw, seen.still, passed)
        # The last release has declared one of ours dead, and knows nothing of our hashes.
        elif self._empty(registry, field.removeprefix(OLD_TOMBSTONE), other.keys):
            self._broker.client.hdel(registry.group.registry, field)

    def _declare(self, other: "_Other", what: str) -> None:
        """Say once that a supervisor is dead: what cannot be rescued is tried at each look."""
        if other.supervisor_id not in self._declared:
            self._declared.add(other.supervisor_id)
            logger.warning("Supervisor %s %s", other.supervisor_id, what)

    # -- rescue ------------------------------------------------------------------------------------

    def rescue(self, registry: Registry, other: "_Other") -> None:
        """Evict a dead supervisor, and put what it had in flight back to its queues."""
        if other.is_of_old_release:
            self._old_release.rescue(registry, other.supervisor_id, other.raw)
            return
        if registry.fence(other.supervisor_id, other.turn or b""):  # it has not moved
            keys = other.keys or registry.own_keys(other.supervisor_id)
            self._empty(registry, other.supervisor_id, keys)

    def _empty(self, registry: Registry, supervisor_id: str, keys: Sequence[EntryKeys]) -> bool:
        """Put back what a dead supervisor had; returns whether it is off the registry."""
        for queue_keys in keys:
            try:
                self._rescue_queue(registry, supervisor_id, queue_keys)
            except RedisError as error:
                if is_outage(error):
                    raise
                # Such as a queue of a wrong type: the other queues go on, and this one is tried
                # again.
                self._broker.report_refusal(f"{queue_keys.inflight}: {error}")
        return registry.forget(supervisor_id, keys)

    def _rescue_queue(self, registry: Registry, supervisor_id: str, keys: EntryKeys) -> None:
        numbers, moved = registry.inflight(keys), 0
        # From the end, as each page goes in front of the last.
        for end in range(len(numbers), 0, -PAGE):
            chosen = numbers[max(0, end - PAGE) : end]
            payloads = registry.payloads(keys, chosen)
            page = [
                (number, payload, rescued(payload))
                for number, payload in zip(chosen, payloads, strict=True)
                if payload is not None
            ]
            moved += registry.rescue(supervisor_id, keys, page)
        if moved:
            logger.warning("Rescued %d tasks from %s", moved, keys.inflight)


class _Other:
    """Another supervisor, as the registry has it."""

    def __init__(self, supervisor_id: str, raw: bytes | None, turn: bytes | None) -> None:
        self.supervisor_id = supervisor_id
        self.raw = raw or b""
        self.turn = turn
        self._entry = read_entry(self.raw)
        self.keys = keys_of_entry(self._entry)
        self.is_garbage = bool(raw) and not self._entry
        # A number without an entry is one of ours whose registration was cut short.
        self.is_of_old_release = raw is not None and self.keys is None

    @property
    def proof(self) -> object:
        """What moves while it lives.

        The last release makes no turns while it is idle, and moves its beat.
        """
        return self._entry.get("beat") if self.is_of_old_release else self.turn

    def is_gone_from(self, host: str) -> bool:
        """Whether it ran on this host, and its process is gone."""
        return self._entry.get("same_host") == host and not is_alive(self._entry.get("pid"))
