"""Rescues what dead supervisors of the last release had claimed; it kept that otherwise.

Its claims are in lists, a lane each, from 0 to its `concurrency` (see `Keys.old_lists`). It renames
the entry of a dead supervisor to `dead:<id>`, under which these lists are looked at for an hour
more: its last claim may have been on its way. To be deleted when nobody runs that release any more.

Not for one of ours that it declares dead: the lease sees to that.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from wakaq.app import WakaQ
from wakaq.errors import ConfigError
from wakaq.message import name_of
from wakaq.queue import Queue
from wakaq.store.broker import Broker
from wakaq.store.connection import RedisError, is_outage
from wakaq.store.keys import OLD_TOMBSTONE
from wakaq.store.registry import Registry, read_entry
from wakaq.worker.outcome import rescued

logger = logging.getLogger("wakaq.supervisor")

KEPT = 3_600.0  # seconds in which a dead supervisor's lists are looked at again
FRESH = 60.0  # seconds in which that is done with each look, and later only that often
PAGE = 100  # payloads rescued in one call


class OldRelease:
    """The steps of a rescue, for the lease's thread."""

    def __init__(self, app: WakaQ, broker: Broker) -> None:
        self._app = app
        self._others: dict[str, Queue] = {}  # queues that this application has not, by name
        self._broker = broker

    def rescue(self, registry: Registry, supervisor_id: str, raw: bytes) -> None:
        """Evict a dead supervisor, then put what it had claimed back to the front of the queues."""
        keys = [registry.group.registry, registry.group.turns]
        args = [supervisor_id, OLD_TOMBSTONE + supervisor_id, raw]
        if self._broker.run_script("old_release_bury", keys, args):
            self._empty(supervisor_id, read_entry(raw))

    def look_again(
        self, registry: Registry, field: str, raw: bytes, still: float, passed: float
    ) -> None:
        """Look once more at what a tombstone stands for.

        `still` is for how many seconds it was seen.
        """
        if still >= FRESH and still // FRESH == (still - passed) // FRESH:
            return
        self._empty(field.removeprefix(OLD_TOMBSTONE), read_entry(raw))
        if still >= KEPT:
            self._broker.client.hdel(registry.group.registry, field)

    def _empty(self, supervisor_id: str, entry: dict[str, Any]) -> None:
        count = entry.get("concurrency")
        lanes = count if isinstance(count, int) else self._app.settings.concurrency
        for queue in self._queues(entry):
            lists = self._broker.keys.old_lists(queue, supervisor_id, lanes)
            for lane, key in enumerate(lists):
                self._empty_list(key, queue, is_of_arrivals=lane == 0)

    def _queues(self, entry: dict[str, Any]) -> Iterator[Queue]:
        """Yield a dead supervisor's queues, which need not be ours: it may have had more."""
        names = entry.get("queues")
        for name in names if isinstance(names, list) else self._app.queues_by_name:
            try:
                if (queue := self._app.queues_by_name.get(name)) is None:
                    queue = self._others[name] = self._others.get(name) or Queue(name)
                yield queue
            except (ConfigError, TypeError):  # whatever the entry holds
                continue

    def _empty_list(self, key: str, queue: Queue, *, is_of_arrivals: bool) -> None:
        try:
            payloads: list[bytes] = self._broker.client.lrange(key, 0, -1)
            if moved := self._requeue(
                key, queue, self._pairs(payloads, is_of_arrivals=is_of_arrivals)
            ):
                logger.warning("Rescued %d tasks from %s", moved, key)
        except RedisError as error:
            if is_outage(error):
                raise
            # Such as WRONGTYPE: the other lists go on.
            self._broker.report_refusal(f"{key}: {error}")

    def _pairs(
        self, payloads: Sequence[bytes], *, is_of_arrivals: bool
    ) -> Iterator[tuple[bytes, bytes]]:
        """Yield each payload with what to push.

        It counts one death more where it may have been running.
        """
        had_sync = False
        for payload in payloads:
            # One sync task at a time ran in a lane's worker, the first; any async one may have been
            # running, and any of those that had arrived on an idle machine.
            is_sync = not self._is_async(payload)
            waited = is_sync and had_sync and not is_of_arrivals
            yield payload, payload if waited else rescued(payload)
            had_sync = had_sync or is_sync

    def _is_async(self, payload: bytes) -> bool:
        task = self._app.tasks.get(name_of(payload) or "")
        return task is not None and task.is_async

    def _requeue(self, key: str, queue: Queue, pairs: Iterator[tuple[bytes, bytes]]) -> int:
        keys = self._broker.keys.of(queue)
        args = [payload for pair in pairs for payload in pair]
        moved = 0
        # From the end, as each page goes in front of the last.
        for end in range(len(args), 0, -2 * PAGE):
            page = args[max(0, end - 2 * PAGE) : end]
            names = [key, keys.queue, keys.stats]
            moved += int(self._broker.run_script("old_release_rescue", names, page))
        return moved
