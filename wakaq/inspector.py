"""Looks into an application's queues and tidies them, for people. Not on the way of any task: that is `broker`.

Counting takes the same time however many tasks wait. Only dead letters, whose number is capped, are read one by one.
"""

from collections.abc import Sequence
from typing import Any

from wakaq.broker import Broker, read_entry
from wakaq.errors import NotAMessage, WakaQError
from wakaq.letters import Letter
from wakaq.message import Message, recount
from wakaq.queue import Queue


class Inspector(Broker):
    """A Broker for commands."""

    def look(self) -> dict[str, Any]:
        """Return counts of each queue in order of priority, and what each supervisor said last of itself, fit for JSON."""
        owners = {owner: read_entry(raw) for owner, raw in self.registry().items()}
        # Not the tombstones of those that were rescued, nor workers that outlive their supervisor.
        supervisors = [
            {"id": owner, **entry}
            for owner, entry in owners.items()
            if "children" in entry and not owner.startswith("dead:")
        ]
        queues = {queue.name: self._count(queue, owners) for queue in self.queues}
        return {"queues": queues, "workers": len(supervisors), "supervisors": supervisors}

    def _count(self, queue: Queue, owners: dict[str, dict[str, Any]]) -> dict[str, Any]:
        keys = self.keys.of(queue)
        with self.client.pipeline(transaction=False) as pipe:
            pipe.llen(keys.queue).zcard(keys.eta).llen(keys.dead).hgetall(keys.stats)
            for owner, entry in owners.items():
                for lane in range(entry.get("concurrency", -1) + 1):
                    pipe.llen(self.keys.inflight(queue, owner, lane))
            pending, delayed, dead, stats, *inflight = pipe.execute()
        counters = ("done", "retried", "dead", "redelivered")
        return {
            "name": queue.name,
            "priority": queue.priority,
            "broker_key": keys.queue,
            "broker_eta_key": keys.eta,
            "pending_tasks": pending,
            "pending_eta_tasks": delayed,
            "inflight_tasks": sum(inflight),
            "dead_letters": dead,
            "stats": {name: int(stats.get(name.encode(), 0)) for name in counters},
        }

    def purge(self, queue: Queue) -> tuple[int, int]:
        """Empty a queue; returns how many pending and how many delayed tasks are gone."""
        waiting, delayed, *_ = self.keys.of(queue)
        with self.client.pipeline(transaction=True) as pipe:
            # Twice: a key of another type is an error before anything is dropped.
            pipe.llen(waiting).zcard(delayed).execute()
            pending, later, _ = pipe.llen(waiting).zcard(delayed).unlink(waiting, delayed).execute()
        return pending, later

    # -- dead letters: index 0 is the oldest, so that a new one changes no other's index ------------

    def count_dead(self, queue: Queue) -> int:
        return int(self.client.llen(self.keys.of(queue).dead))

    def dead(self, queue: Queue, indexes: Sequence[int]) -> list[bytes]:
        """Return the dead letters of these indexes.

        Raises:
            WakaQError: One of them is not there.
        """
        with self.client.pipeline(transaction=False) as pipe:
            for index in indexes:
                pipe.lindex(self.keys.of(queue).dead, -1 - index)
            letters: list[Any] = pipe.execute()
        if None in letters:
            gone, count = indexes[letters.index(None)], self.count_dead(queue)
            there = f"there are 0 to {count - 1}" if count else "there are none"
            raise WakaQError(f"dead letter {gone} of queue {queue.name!r} is gone; {there}")
        return letters

    def revive(self, queue: Queue, letter: bytes) -> bool:
        """Put a dead letter's task back at the end of its queue, to start anew; False if the letter is gone."""
        payload = Letter.decode(letter).payload
        try:
            message = Message.decode(payload)
        except NotAMessage:  # what it is will be told in its next dead letter
            pass
        else:
            if message.retry or message.redelivered:
                payload = recount(payload, retry=0, redelivered=0)
        keys = [self.keys.of(queue).dead, self.keys.of(queue).queue]
        return bool(self.run_script("revive", keys, [letter, payload]))

    def drop(self, queue: Queue, letters: Sequence[bytes]) -> int:
        """Delete dead letters; returns how many were still there."""
        with self.client.pipeline(transaction=False) as pipe:
            for letter in letters:
                pipe.lrem(self.keys.of(queue).dead, -1, letter)
            return sum(pipe.execute())
