"""Proof of life: moves this supervisor's heartbeat, watches the others', and rescues what the dead ones had claimed.

No clocks of two machines are compared. An observer counts only time in which it had Redis itself and the other's heartbeat
stood still: so an outage, or a failover, never makes live supervisors rob each other.
"""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from secrets import token_hex
from typing import Any

from wakaq.app import WakaQ
from wakaq.broker import Broker, read_entry
from wakaq.client import OUTAGES, RedisError
from wakaq.errors import ConfigError, NotAMessage
from wakaq.message import Message, recount
from wakaq.queue import Queue
from wakaq.supervisor.service import Outage, Service
from wakaq.turn import Lane

logger = logging.getLogger("wakaq.supervisor")

TERM = 15.0  # seconds without a heartbeat after which a supervisor is declared dead
BEAT = 3.0  # seconds between heartbeats
TOMBSTONE = 3_600.0  # seconds in which a dead supervisor's lanes are looked at again
BURIED = "dead:"  # in front of the id, in a tombstone's field
FRESH = 60.0  # seconds in which that is done with each heartbeat, and later only that often
MOST_LANES = 10_000  # of a queue: an entry could say anything
_PAGE = 100  # payloads rescued in one call


class Lease(Service):
    """The thread that beats and rescues; `register` and `leave` are the main thread's, or the dispatcher's.

    `describe` returns what the children do, for people, as JSON can hold it.
    """

    def __init__(
        self, app: WakaQ, outage: Outage, describe: Callable[[], Any], term: float = TERM
    ) -> None:
        super().__init__(outage)
        self.interval = self.longest_pause = min(BEAT, term / 5)
        self._app = app
        # One call that is left without an answer must not cost the lease.
        settings, most = app.settings, term / 3
        settings = replace(
            settings,
            socket_timeout=min(settings.socket_timeout, most),
            socket_connect_timeout=min(settings.socket_connect_timeout, most),
        )
        self._broker = Broker(settings, app.queues)
        self._describe = describe
        self._term = term
        self._host = _host_identity()
        # Written by `register` before the id is known to anybody; an attribute is replaced in one step.
        self.worker_id = ""
        self._fresh_until = 0.0
        # Written by this thread, for the dispatcher: the id under which we are not known any more.
        self.lost: str | None = None
        # This thread only.
        self._counter = 0
        self._last_tick: float | None = None  # None after one that failed
        # Supervisor id -> its heartbeat, and for how long we saw it stand still.
        self._seen: dict[str, tuple[Any, float]] = {}

    # -- this supervisor ---------------------------------------------------------------------------

    def register(self) -> str:
        """Announce this supervisor under a new id, which is returned."""
        host = "".join(c if c.isalnum() or c in "-." else "-" for c in socket.gethostname())
        worker_id, now = f"{host}-{os.getpid()}-{token_hex(4)}", time.monotonic()
        self._broker.register(worker_id, self._entry())
        self.worker_id, self._fresh_until = worker_id, now + self._term
        return worker_id

    def leave(self, *, is_haunted: bool) -> None:
        """Leave the registry; where something may yet be claimed, as a tombstone, whose lanes are looked at again."""
        # The first time it may be on a connection that fell silent long ago.
        with contextlib.suppress(*OUTAGES):
            return self._leave(is_haunted=is_haunted)
        return self._leave(is_haunted=is_haunted)

    def _leave(self, *, is_haunted: bool) -> None:
        if not is_haunted:
            self._broker.unregister(self.worker_id)
        elif entry := self._broker.registry().get(self.worker_id):
            self._broker.bury(self.worker_id, BURIED + self.worker_id, entry)

    def is_fresh(self) -> bool:
        """Whether no other supervisor can have declared this one dead."""
        return time.monotonic() < self._fresh_until

    def _entry(self) -> dict[str, Any]:
        return {
            "beat": self._counter,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "same_host": self._host,
            "concurrency": self._app.settings.concurrency,
            "queues": [queue.name for queue in self._app.queues],
            "children": self._describe(),
        }

    # -- the thread --------------------------------------------------------------------------------

    def tick(self, now: float) -> float | None:
        worker_id = self.worker_id
        self._counter += 1
        last_tick, self._last_tick = self._last_tick, None
        if self._broker.beat(worker_id, self._entry()):
            self._fresh_until = now + self._term
        else:  # the dispatcher registers anew
            self._fresh_until, self.lost = 0.0, worker_id
        self._outage.end(now)
        # Time counts only if Redis answered at both its ends, and if we were not stopped ourselves in between. Otherwise
        # the observation starts anew.
        if last_tick is None or now - last_tick > 2 * self.interval:
            last_tick = now
            self._seen = {id_: seen for id_, seen in self._seen.items() if id_.startswith(BURIED)}
        self._watch_others(worker_id, now - last_tick)
        self._last_tick = now
        return None

    def _watch_others(self, worker_id: str, passed: float) -> None:
        entries = self._broker.registry()
        entries.pop(worker_id, None)
        seen: dict[str, tuple[Any, float]] = {}
        for field, raw in entries.items():
            entry = read_entry(raw)
            if not entry and field not in self._seen:
                logger.warning("The registry's entry %s is no supervisor's: %r", field, raw[:100])
            beat = entry.get("beat")
            last, still = self._seen.get(field, (None, 0.0))
            still = still + passed if field in self._seen and beat == last else 0.0
            seen[field] = (beat, still)
            if not field.startswith(BURIED):
                if still >= self._term:
                    logger.warning(
                        "Supervisor %s has not moved for %.0f s: it is dead", field, still
                    )
                    self.rescue(field, raw)
            elif still < FRESH or still // FRESH > (still - passed) // FRESH:
                # Its last claim may have come after its rescue.
                self._empty_lanes(field.removeprefix(BURIED), raw)
                if still >= TOMBSTONE:
                    self._broker.forget(field)
        self._seen = seen

    # -- rescue ------------------------------------------------------------------------------------

    def rescue_neighbours(self) -> None:
        """Rescue at once from supervisors of this host whose process is gone."""
        for field, raw in self._broker.registry().items():
            entry = read_entry(raw)
            is_neighbour = entry.get("same_host") == self._host and not field.startswith(BURIED)
            if is_neighbour and not _is_alive(entry.get("pid")):
                logger.warning("Supervisor %s of this host is gone", field)
                self.rescue(field, raw)

    def rescue(self, worker_id: str, raw: bytes) -> None:
        """Fence a dead supervisor off, then put what it had in flight back to the front of the queues."""
        if self._broker.bury(worker_id, BURIED + worker_id, raw):
            self._empty_lanes(worker_id, raw)

    def _empty_lanes(self, worker_id: str, raw: bytes) -> None:
        entry = read_entry(raw)
        count, names = entry.get("concurrency"), entry.get("queues")
        if not isinstance(count, int):
            count = self._app.settings.concurrency
        if not isinstance(names, list):
            names = list(self._app.queues_by_name)
        lanes = [
            self._broker.lane(queue, worker_id, number)
            for queue in filter(None, map(self._queue, names))
            for number in range(min(count + 1, MOST_LANES))
        ]
        _, contents = self._broker.inflight(worker_id, lanes)
        for lane, payloads in zip(lanes, contents, strict=True):
            if payloads:
                self._requeue(lane, payloads)

    def _queue(self, name: Any) -> Queue | None:
        """Return a dead supervisor's queue, which need not be one of ours: an older release may have had more."""
        try:
            return self._app.queues_by_name.get(name) or Queue(name)
        except (ConfigError, TypeError):  # whatever the entry holds
            return None

    def _requeue(self, lane: Lane, payloads: list[bytes]) -> None:
        pairs, had_sync, moved = [], False, 0
        for payload in payloads:
            is_sync, new = self._redelivered(payload)
            # One sync task at a time runs in a lane's worker, the first; any async one may have been running, and any of
            # those that a watcher claimed, which went to idle workers.
            pairs.append((payload, payload if is_sync and had_sync and lane.number else new))
            had_sync = had_sync or is_sync
        try:
            # From the end, as each page goes in front of the last.
            for end in range(len(pairs), 0, -_PAGE):
                moved += self._broker.rescue(lane, pairs[max(0, end - _PAGE) : end])
        except OUTAGES:
            raise
        except RedisError as error:  # such as WRONGTYPE: the other lanes go on
            self._broker.complain(f"{lane.key} cannot be rescued: {error}")
        if moved:
            logger.warning("Rescued %d tasks from %s", moved, lane.key)

    def _redelivered(self, payload: bytes) -> tuple[bool, bytes]:
        """Return whether a payload is of a sync task, and what it is once it has been redelivered."""
        try:
            message = Message.decode(payload)
        except NotAMessage:  # whoever claims it makes a dead letter of it
            return False, payload
        task = self._app.tasks.get(message.name)
        is_sync = task is None or not task.is_async
        return is_sync, recount(payload, redelivered=message.redelivered + 1)


def _host_identity() -> str:
    """Return what tells apart machines, their boots, and containers: a pid means something only within all three."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not Linux
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _is_alive(pid: Any) -> bool:
    """Whether a process of that number lives; if it is another one by now, its lease ends the wait."""
    if not isinstance(pid, int) or not 0 < pid < 1 << 31:
        return True
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2][:1]
    except ProcessLookupError:
        return False
    except OSError:  # another user's, or not Linux
        return True
    return pid != os.getpid() and state != b"Z"  # dead, and its parent has not noticed
