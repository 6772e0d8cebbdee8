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

from wakaq.queue import Queue


class Keys:
    """Builds keys under one prefix."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def _key(self, kind: str, queue: Queue, *rest: object) -> str:
        parts = (queue.prefix or self.prefix, kind, queue.name, *map(str, rest))
        return ":".join(part for part in parts if part)

    def queue(self, queue: Queue) -> str:
        return self._key("", queue)

    def eta(self, queue: Queue) -> str:
        return self._key("eta", queue)

    def inflight(self, queue: Queue, worker_id: str, lane: int) -> str:
        return self._key("inflight", queue, worker_id, lane)

    def dead(self, queue: Queue) -> str:
        return self._key("dead", queue)

    def stats(self, queue: Queue) -> str:
        return self._key("stats", queue)

    def cron(self, queue: Queue, identity: str) -> str:
        return self._key("cron", queue, identity)

    def registry(self) -> str:
        return f"{self.prefix}:registry:workers"

    def turns(self) -> str:
        return f"{self.prefix}:registry:turns"

    def broadcast(self) -> str:
        return f"{self.prefix}-broadcast"
