"""Looks into an application's queues and tidies them, for people and programs.

Not on the way of any task: that is `broker`. Counting takes the same time however many tasks wait;
only dead letters, whose number is capped, are read one by one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from wakaq.errors import NotAMessage, WakaQError
from wakaq.message import Message, recount
from wakaq.queue import Queue
from wakaq.store.broker import Broker
from wakaq.store.dead_letter import DeadLetter
from wakaq.store.keys import OLD_TOMBSTONE
from wakaq.store.registry import Registry, read_entry


@dataclass(frozen=True, slots=True)
class RunningTask:
    """A task that runs now."""

    name: str  # the call, as `send('Ada')`
    seconds: float | None  # for how long; None if the entry does not say

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> "RunningTask":
        """Read one of a child's `tasks`."""
        seconds = entry.get("seconds")
        return cls(str(entry["name"]), None if seconds is None else float(seconds))


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker process, as its supervisor last described it."""

    slot: int
    pid: int
    rss: int  # bytes
    is_silent: bool  # it does not answer its supervisor
    tasks: tuple[RunningTask, ...]

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> "WorkerInfo":
        """Read one of the `children` of a supervisor's entry."""
        return cls(
            slot=int(entry["number"]),
            pid=int(entry["pid"]),
            rss=int(entry.get("rss", 0)),
            is_silent=bool(entry.get("is_silent")),
            tasks=tuple(RunningTask.from_entry(task) for task in entry["tasks"]),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it as `wakaq-info --json` shows it."""
        fields = asdict(self)
        return {"number": fields.pop("slot"), **fields}


@dataclass(frozen=True, slots=True)
class SupervisorInfo:
    """A running `wakaq-worker`, as it last described itself."""

    id: str
    beat: int  # its counter of heartbeats
    host: str
    pid: int
    same_host: str  # equal for supervisors whose pids mean the same processes
    concurrency: int
    queues: tuple[str, ...]  # names
    workers: tuple[WorkerInfo, ...]

    @classmethod
    def from_entry(cls, supervisor_id: str, entry: Mapping[str, Any]) -> "SupervisorInfo | None":
        """Read an entry of the registry; None if it is not a supervisor's.

        A worker that outlived its supervisor has an entry, too, but no children.
        """
        try:
            return cls(
                id=supervisor_id,
                beat=int(entry.get("beat", 0)),
                host=str(entry.get("host", "")),
                pid=int(entry.get("pid", 0)),
                same_host=str(entry.get("same_host", "")),
                concurrency=int(entry.get("concurrency", 0)),
                queues=tuple(str(name) for name in entry.get("queues", ())),
                workers=tuple(WorkerInfo.from_entry(child) for child in entry["children"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError):  # Redis can hold anything
            return None

    def to_dict(self) -> dict[str, Any]:
        """Return it as `wakaq-info --json` shows it."""
        fields = asdict(self)
        del fields["workers"]
        return fields | {"children": [worker.to_dict() for worker in self.workers]}


@dataclass(frozen=True, slots=True)
class QueueStats:
    """What is in a queue, and what became of its tasks since its counters began."""

    name: str
    priority: int | None
    key: str
    eta_key: str
    pending: int
    delayed: int
    inflight: int
    dead_letters: int
    done: int
    retried: int
    dead: int
    redelivered: int

    @property
    def failed(self) -> int:
        """How many runs of tasks failed, whether or not they were tried again."""
        return self.retried + self.dead

    def to_dict(self) -> dict[str, Any]:
        """Return it as `wakaq-info --json` shows it."""
        return {
            "name": self.name,
            "priority": self.priority,
            "broker_key": self.key,
            "broker_eta_key": self.eta_key,
            "pending_tasks": self.pending,
            "pending_eta_tasks": self.delayed,
            "inflight_tasks": self.inflight,
            "dead_letters": self.dead_letters,
            "stats": {
                "done": self.done,
                "retried": self.retried,
                "dead": self.dead,
                "redelivered": self.redelivered,
            },
        }


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Queues in order of priority, and supervisors, as they are at one moment."""

    queues: tuple[QueueStats, ...]
    supervisors: tuple[SupervisorInfo, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as `wakaq-info --json` shows it."""
        return {
            "queues": {queue.name: queue.to_dict() for queue in self.queues},
            "workers": len(self.supervisors),
            "supervisors": [supervisor.to_dict() for supervisor in self.supervisors],
        }


class Inspector:
    """What commands ask of Redis, and what they change there."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._client = broker.client
        self._keys = broker.keys

    # -- counts ------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Count what is in the queues, and read what each supervisor last said of itself."""
        stats: dict[str, QueueStats] = {}
        supervisors: list[SupervisorInfo] = []
        for group in self._broker.groups:
            entries = {
                supervisor_id: read_entry(raw)
                for supervisor_id, raw in Registry(self._broker, group).entries().items()
                if not supervisor_id.startswith(OLD_TOMBSTONE)
            }
            found = (SupervisorInfo.from_entry(*item) for item in entries.items())
            supervisors += filter(None, found)
            stats |= {queue.name: self._count(queue, entries) for queue in group.queues}
        in_order = tuple(stats[queue.name] for queue in self._broker.queues)
        return Snapshot(in_order, tuple(supervisors))

    def _count(self, queue: Queue, entries: Mapping[str, Mapping[str, Any]]) -> QueueStats:
        keys = self._keys.of(queue)
        with self._client.pipeline(transaction=False) as pipe:
            pipe.llen(keys.head).llen(keys.queue).zcard(keys.eta).llen(keys.dead)
            pipe.hgetall(keys.stats)
            for supervisor_id, entry in entries.items():
                self._count_inflight(pipe, queue, supervisor_id, entry)
            head, rest, delayed, dead_letters, counters, *inflight = pipe.execute()
        return QueueStats(
            name=queue.name,
            priority=queue.priority,
            key=keys.queue,
            eta_key=keys.eta,
            pending=head + rest,
            delayed=delayed,
            inflight=sum(inflight),
            dead_letters=dead_letters,
            done=int(counters.get(b"done", 0)),
            retried=int(counters.get(b"retried", 0)),
            dead=int(counters.get(b"dead", 0)),
            redelivered=int(counters.get(b"redelivered", 0)),
        )

    def _count_inflight(
        self, pipe: Any, queue: Queue, supervisor_id: str, entry: Mapping[str, Any]
    ) -> None:
        """Ask for the numbers of payloads that a supervisor has claimed from a queue."""
        if "keys" in entry:
            pipe.hlen(self._keys.inflight(queue, supervisor_id))
            return
        # The last release kept them in lists, one for its dispatcher and one for each worker.
        concurrency = entry.get("concurrency")
        if isinstance(concurrency, int):
            for key in self._keys.old_lists(queue, supervisor_id, concurrency):
                pipe.llen(key)

    # -- purge -------------------------------------------------------------------------------------

    def purge(self, queue: Queue) -> tuple[int, int]:
        """Empty a queue; returns how many pending and how many delayed tasks are gone."""
        keys = self._keys.of(queue)
        with self._client.pipeline(transaction=True) as pipe:
            # Counted twice: a key of another type is an error before anything is dropped.
            pipe.llen(keys.head).llen(keys.queue).zcard(keys.eta).execute()
            pipe.llen(keys.head).llen(keys.queue).zcard(keys.eta)
            pipe.unlink(keys.head, keys.queue, keys.eta)
            head, rest, delayed, _ = pipe.execute()
        return head + rest, delayed

    # -- dead letters: index 0 is the oldest, so that a new one changes no other's index -----------

    def count_dead_letters(self, queue: Queue) -> int:
        """Return how many dead letters a queue has."""
        return int(self._client.llen(self._keys.of(queue).dead))

    def dead_letters(self, queue: Queue, indexes: Sequence[int]) -> list[bytes]:
        """Return the dead letters of these indexes as Redis keeps them, for `DeadLetter.decode`.

        Raises:
            WakaQError: One of them is not there.
        """
        with self._client.pipeline(transaction=False) as pipe:
            for index in indexes:
                pipe.lindex(self._keys.of(queue).dead, -1 - index)
            letters: list[bytes | None] = pipe.execute()
        if None in letters:
            gone, count = indexes[letters.index(None)], self.count_dead_letters(queue)
            there = f"there are 0 to {count - 1}" if count else "there are none"
            raise WakaQError(f"dead letter {gone} of queue {queue.name!r} is gone; {there}")
        return [letter for letter in letters if letter is not None]

    def retry_dead_letter(self, queue: Queue, letter: bytes) -> bool:
        """Put a dead letter's payload back at the end of its queue, its counts of retries at zero.

        Returns False if the letter is gone.
        """
        payload = DeadLetter.decode(letter).payload
        try:
            message = Message.decode(payload)
        except NotAMessage:  # it goes back as it is, and its next dead letter says what it is
            pass
        else:
            if message.retry or message.redelivered or message.unknown:
                payload = recount(payload, retry=0, redelivered=0, unknown=0)
        keys = [self._keys.of(queue).dead, self._keys.of(queue).queue]
        return bool(self._broker.run_script("retry_dead_letter", keys, [letter, payload]))

    def purge_dead_letters(self, queue: Queue, letters: Sequence[bytes]) -> int:
        """Delete dead letters; returns how many of them were still there."""
        with self._client.pipeline(transaction=False) as pipe:
            for letter in letters:
                pipe.lrem(self._keys.of(queue).dead, -1, letter)
            return sum(pipe.execute())
