"""Spells every Redis key; nothing else in the package contains a key's text.

Not for commands: those are in `broker` and in the scripts.

==================================  ======  ========================================  =============
key                                 type    contents                                  deleted by
==================================  ======  ========================================  =============
``wakaq:<queue>``                   list    waiting payloads, left is the front       claims, purge
``wakaq:head:<queue>``              list    its front part: what a wake-up moved;     claims,
                                            claimed first                             purge, leave
``wakaq:eta:<queue>``               zset    delayed payloads, by due unix time        promotion,
                                                                                      purge
``wakaq:inflight:<queue>:<id>``     hash    sequence number -> payload that           settlements,
                                            supervisor `id` has claimed               adopt, rescue
``wakaq:dead:<queue>``              list    dead letters (JSON), newest first,        dead retry,
                                            capped                                    dead purge
``wakaq:stats:<queue>``             hash    done, retried, dead, redelivered          nobody
``wakaq:registry:workers``          hash    supervisor id -> its entry (JSON)         leave, rescue
``wakaq:registry:turns``            hash    supervisor id -> number and token of its  leave,
                                            last turn, and what that turn gave        rescue, adopt
``wakaq:cron:<queue>:<schedule>``   string  unix time of the last tick enqueued       expires
``wakaq-broadcast``                 pubsub  broadcast payloads
==================================  ======  ========================================  =============

The last release of WakaQ without `head` kept what it had claimed in lists,
``wakaq:inflight:<queue>:<id>:<lane>``, and renamed the registry entry of a dead supervisor to
``dead:<id>``; see `wakaq.supervisor.old_release`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from wakaq.queue import Queue

OLD_TOMBSTONE = "dead:"  # in front of the id of a supervisor that the last release declared dead
MOST_OLD_LANES = 10_000  # of a queue: an entry could say anything


class QueueKeys(NamedTuple):
    """The keys of one queue, but for those that name a supervisor or a schedule."""

    queue: str
    head: str
    eta: str
    dead: str
    stats: str
    inflight: str  # followed by a supervisor's id

    @classmethod
    def of(cls, prefix: str, name: str) -> "QueueKeys":
        """Spell the keys of the queue of this name."""
        head, eta, dead, stats = (
            f"{prefix}:{kind}:{name}" for kind in ("head", "eta", "dead", "stats")
        )
        return cls(f"{prefix}:{name}", head, eta, dead, stats, f"{prefix}:inflight:{name}:")


@dataclass(frozen=True)
class SlotGroup:
    """Queues whose keys may meet in one script, and where supervisors register for them.

    On a standalone server all queues are one group; clusters are not supported yet, so there is
    always one.
    """

    prefix: str  # of registry and turns
    queues: tuple[Queue, ...]  # in order of priority

    @property
    def registry(self) -> str:
        """The hash of entries."""
        return f"{self.prefix}:registry:workers"

    @property
    def turns(self) -> str:
        """The hash of turn numbers."""
        return f"{self.prefix}:registry:turns"


class Keys:
    """Spells keys under one prefix."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.broadcast = f"{prefix}-broadcast"
        self._known: dict[Queue, QueueKeys] = {}

    def of(self, queue: Queue) -> QueueKeys:
        """Return the keys of a queue."""
        if (keys := self._known.get(queue)) is None:
            keys = self._known[queue] = QueueKeys.of(queue.prefix or self._prefix, queue.name)
        return keys

    def inflight(self, queue: Queue, supervisor_id: str) -> str:
        """Return the key of what a supervisor has claimed from a queue."""
        return self.of(queue).inflight + supervisor_id

    def old_lists(self, queue: Queue, supervisor_id: str, concurrency: int) -> list[str]:
        """Return the lists in which a supervisor of the last release kept what it had claimed.

        The first one had what arrived while it was idle, the others belonged to a worker each.
        """
        lanes = range(min(concurrency + 1, MOST_OLD_LANES))
        return [f"{self.inflight(queue, supervisor_id)}:{lane}" for lane in lanes]

    def cron(self, queue: Queue, identity: str) -> str:
        """Return the key of a schedule's last tick."""
        return f"{queue.prefix or self._prefix}:cron:{queue.name}:{identity}"

    def groups(self, queues: Sequence[Queue]) -> list[SlotGroup]:
        """Part queues into slot groups."""
        return [SlotGroup(self._prefix, tuple(queues))]
