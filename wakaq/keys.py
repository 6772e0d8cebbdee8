"""Spells every Redis key; nothing else in the package contains a key's text. Not for commands: those are in `broker`.

=====================================  ======  =============================================  =====================
key                                    type    contents                                       deleted by
=====================================  ======  =============================================  =====================
``wakaq:<queue>``                      list    waiting payloads, left is the front            claims, `purge`
``wakaq:eta:<queue>``                  zset    delayed payloads, scored by due unix time      promotion, `purge`
``wakaq:inflight:<queue>:<id>:<n>``    list    payloads that supervisor `id` has claimed;     acks, rescue
                                               lane 0: by a watcher, else for child n
``wakaq:dead:<queue>``                 list    dead letters (JSON), newest first, capped      `dead retry|purge`
``wakaq:stats:<queue>``                hash    counters done, retried, dead,                  nobody
                                               redelivered
``wakaq:registry:workers``             hash    supervisor id -> JSON of its last heartbeat;   shutdown, rescue
                                               ``dead:<id>`` -> tombstone of a rescued one
``wakaq:registry:turns``               hash    supervisor id -> number of its last turn: the  shutdown, rescue
                                               fence that makes a turn happen once
``wakaq:cron:<queue>:<schedule>``      string  unix time of the last tick enqueued            expires
``wakaq-broadcast``                    pubsub  broadcast payloads
=====================================  ======  =============================================  =====================
"""

from typing import NamedTuple

from wakaq.queue import Queue


class QueueKeys(NamedTuple):
    """The keys of one queue, but for those that name a supervisor or a schedule."""

    queue: str
    eta: str
    dead: str
    stats: str


class Keys:
    """Spells keys under one prefix."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.registry = f"{prefix}:registry:workers"
        self.turns = f"{prefix}:registry:turns"
        self.broadcast = f"{prefix}-broadcast"
        self._known: dict[str, QueueKeys] = {}

    def of(self, queue: Queue) -> QueueKeys:
        keys = self._known.get(queue.name)
        if keys is None:
            prefix, name = queue.prefix or self._prefix, queue.name
            kinds = (f"{prefix}:{kind}:{name}" for kind in ("eta", "dead", "stats"))
            keys = self._known[name] = QueueKeys(f"{prefix}:{name}", *kinds)
        return keys

    def inflight(self, queue: Queue, worker_id: str, lane: int) -> str:
        return f"{queue.prefix or self._prefix}:inflight:{queue.name}:{worker_id}:{lane}"

    def cron(self, queue: Queue, identity: str) -> str:
        return f"{queue.prefix or self._prefix}:cron:{queue.name}:{identity}"
