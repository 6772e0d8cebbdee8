"""Spells every Redis key; nothing else in the package contains a key's text. Not for commands: those are in `broker`.

=====================================  ======  =============================================  =====================
key                                    type    contents                                       deleted by
=====================================  ======  =============================================  =====================
``wakaq:<queue>``                      list    waiting payloads, left is the front            claims, `purge`
``wakaq:eta:<queue>``                  zset    delayed payloads, scored by due unix time      promotion, `purge`
``wakaq:inflight:<queue>:<id>:<n>``    list    payloads that supervisor `id` has claimed;     acks, rescue
                                               lane 0: by a watcher, else for child n
``wakaq:dead:<queue>``                 list    dead letters (JSON), newest first, capped      `dead retry|purge`
``wakaq:stats:<queue>``                hash    counters done, failed, retried, dead,          nobody
                                               redelivered
``wakaq:registry:workers``             hash    supervisor id -> JSON of its last heartbeat;   shutdown, rescue
                                               ``dead:<id>`` -> tombstone of a rescued one
``wakaq:registry:turns``               hash    supervisor id -> number of its last turn: the  shutdown, rescue
                                               fence that makes a turn happen once
``wakaq:cron:<queue>:<schedule>``      string  unix time of the last tick enqueued            expires
``wakaq-broadcast``                    pubsub  broadcast payloads
=====================================  ======  =============================================  =====================

On Redis Cluster a queue's name stands in braces, so that all keys of one queue share a slot; the turns of its
supervisors are then kept per queue.
"""

from wakaq.queue import Queue


class Keys:
    """Builds keys under one prefix."""

    def __init__(self, prefix: str, *, is_cluster: bool = False) -> None:
        self.prefix = prefix
        self.is_cluster = is_cluster

    def _key(self, kind: str, queue: Queue, *rest: object) -> str:
        name = f"{{{queue.name}}}" if self.is_cluster else queue.name
        parts = (queue.prefix or self.prefix, kind, name, *map(str, rest))
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

    def turns(self, queue: Queue) -> str:
        shard = f":{{{queue.name}}}" if self.is_cluster else ""
        return f"{self.prefix}:registry:turns{shard}"

    def broadcast(self) -> str:
        return f"{self.prefix}-broadcast"
