"""Looks into an application's queues and tidies them, for people. Not on the way of any task: that is `broker`.

Counting takes the same time however many tasks wait. Only dead letters, whose number is capped, are read one by one.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from wakaq.broker import Broker
from wakaq.errors import NotAMessage, WakaQError
from wakaq.letters import Letter
from wakaq.message import Message, recount
from wakaq.queue import Queue

_PAGE = 100  # dead letters, of some kilobytes each, in one reply
_COUNTERS = ("done", "retried", "dead", "redelivered")


@dataclass(frozen=True, slots=True)
class Counts:
    """What is in a queue, and what became of its tasks since it has been there."""

    pending: int
    delayed: int
    inflight: int
    dead_letters: int
    stats: dict[str, int]

    @property
    def failed(self) -> int:
        """How many runs did not end well, whether or not the task was tried again."""
        return self.stats["retried"] + self.stats["dead"]


class Snapshot(NamedTuple):
    """The counts of each queue, in the order of their priority, and what each supervisor said last of itself."""

    queues: list[tuple[Queue, Counts]]
    supervisors: dict[str, dict[str, Any]]


class Inspector(Broker):
    """A Broker for commands."""

    client: Any  # which types replies as what any of redis-py's clients may return

    def look(self) -> Snapshot:
        """Count."""
        with self.client.pipeline(transaction=False) as pipe:
            pipe.hgetall(self.keys.registry())
            for queue in self.queues:
                pipe.llen(self.keys.queue(queue))
                pipe.zcard(self.keys.eta(queue))
                pipe.llen(self.keys.dead(queue))
                pipe.hgetall(self.keys.stats(queue))
            registry, *replies = pipe.execute()
        owners = {key.decode(errors="replace"): _read(raw) for key, raw in registry.items()}
        inflight = self._count_inflight(owners)
        queues = []
        for number, queue in enumerate(self.queues):
            pending, delayed, dead, stats = replies[4 * number : 4 * number + 4]
            counters = {name: int(stats.get(name.encode(), 0)) for name in _COUNTERS}
            queues.append((queue, Counts(pending, delayed, inflight[queue.name], dead, counters)))
        # Not the tombstones of those that were rescued, nor workers that outlive their supervisor.
        supervisors = {owner: entry for owner, entry in owners.items() if "children" in entry}
        return Snapshot(queues, {o: e for o, e in supervisors.items() if not o.startswith("dead:")})

    def _count_inflight(self, owners: dict[str, dict[str, Any]]) -> dict[str, int]:
        counts = {queue.name: 0 for queue in self.queues}
        with self.client.pipeline(transaction=False) as pipe:
            lanes = []
            for owner, entry in owners.items():
                size = entry.get("concurrency")
                numbers = range(size + 1 if isinstance(size, int) else 0)
                for queue, number in itertools.product(self.queues, numbers):
                    pipe.llen(self.keys.inflight(queue, owner, number))
                    lanes.append(queue.name)
            for name, length in zip(lanes, pipe.execute(), strict=True):
                counts[name] += cast("int", length)
        return counts

    def purge(self, queue: Queue) -> tuple[int, int]:
        """Empty a queue; returns how many pending and how many delayed tasks are gone."""
        waiting, delayed = self.keys.queue(queue), self.keys.eta(queue)
        with self.client.pipeline(transaction=True) as pipe:
            # Twice: a key of another type is an error before anything is dropped.
            pipe.llen(waiting).zcard(delayed).execute()
            pending, later, _ = pipe.llen(waiting).zcard(delayed).unlink(waiting, delayed).execute()
        return pending, later

    # -- dead letters: index 0 is the oldest, so that a new one changes no other's index ------------

    def count_dead(self, queue: Queue) -> int:
        return int(self.client.llen(self.keys.dead(queue)))

    def dead(self, queue: Queue, indexes: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Return the dead letters of these indexes, with them.

        Raises:
            WakaQError: One of them is not there.
        """
        for start in range(0, len(indexes), _PAGE):
            page = indexes[start : start + _PAGE]
            with self.client.pipeline(transaction=False) as pipe:
                for index in page:
                    pipe.lindex(self.keys.dead(queue), -1 - index)
                letters = pipe.execute()
            if None in letters:
                gone, count = page[letters.index(None)], self.count_dead(queue)
                there = f"there are 0 to {count - 1}" if count else "there are none"
                raise WakaQError(f"dead letter {gone} of queue {queue.name!r} is gone; {there}")
            yield from zip(page, letters, strict=True)

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
        keys = [self.keys.dead(queue), self.keys.queue(queue)]
        return bool(self.run_script("revive", keys, [letter, payload]))

    def drop(self, queue: Queue, letters: Sequence[bytes]) -> int:
        """Delete dead letters; returns how many were still there."""
        with self.client.pipeline(transaction=False) as pipe:
            for letter in letters:
                pipe.lrem(self.keys.dead(queue), -1, letter)
            return sum(pipe.execute())


def _read(raw: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(raw)
    except ValueError:
        entry = None
    return entry if isinstance(entry, dict) else {}
