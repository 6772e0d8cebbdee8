"""Who is registered, and the steps of a rescue.

Not for deciding who is dead: that is `wakaq.supervisor.lease`.
"""

import contextlib
import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

from wakaq.store.broker import Broker
from wakaq.store.connection import pack
from wakaq.store.keys import SlotGroup


@dataclass(frozen=True)
class EntryKeys:
    """The keys of one queue of a supervisor, as its entry has them.

    The queue may be named otherwise here.
    """

    queue: str
    head: str
    inflight: str
    stats: str


class Registry:
    """The entries and turn numbers of one slot group."""

    def __init__(self, broker: Broker, group: SlotGroup) -> None:
        self._broker = broker
        self.group = group
        self._keys = [group.turns, group.registry]

    def own_keys(self, supervisor_id: str) -> list[EntryKeys]:
        """Return the keys that a supervisor of this application has."""
        spelled = [self._broker.keys.of(queue) for queue in self.group.queues]
        return [EntryKeys(k.queue, k.head, k.inflight + supervisor_id, k.stats) for k in spelled]

    def new_entry(
        self, supervisor_id: str, turn_number: int, concurrency: int, **more: object
    ) -> dict[str, Any]:
        """Return what a supervisor, or an orphaned worker, says of itself.

        The last release takes those for dead whose `beat` stands still, and reads `concurrency` and
        `queues`.
        """
        return {
            "beat": turn_number,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "same_host": host_identity(),
            "concurrency": concurrency,
            "queues": [queue.name for queue in self.group.queues],
            "keys": [asdict(keys) for keys in self.own_keys(supervisor_id)],
            **more,
        }

    def entries(self) -> dict[str, bytes]:
        """Return each supervisor's entry as it is, for `read_entry`."""
        return self._read(self.group.registry)

    def turns(self) -> dict[str, bytes]:
        """Return the number of each supervisor's last turn, with its token and what it gave."""
        return self._read(self.group.turns)

    def beat(self, supervisor_id: str, entry: Mapping[str, object]) -> bool:
        """Renew an entry; False if its supervisor is evicted."""
        args = [supervisor_id, json.dumps(entry)]
        return bool(self._broker.run_script("beat", self._keys, args))

    # -- rescue ------------------------------------------------------------------------------------

    def fence(self, supervisor_id: str, turn: bytes) -> bool:
        """Evict a supervisor whose last turn is still this one, empty for none.

        False if it has moved.
        """
        return bool(self._broker.run_script("fence", [self.group.turns], [supervisor_id, turn]))

    def inflight(self, keys: EntryKeys) -> list[int]:
        """Return the numbers of what is in flight, in order."""
        return sorted(map(int, self._call("HKEYS", keys.inflight)))

    def payloads(self, keys: EntryKeys, numbers: Sequence[int]) -> list[bytes | None]:
        """Return what is in flight under these numbers."""
        found: list[bytes | None] = self._call("HMGET", keys.inflight, *numbers)
        return found

    def _read(self, key: str) -> dict[str, bytes]:
        found = self._call("HGETALL", key)
        names = (name.decode(errors="replace") for name in found[::2])
        return dict(zip(names, found[1::2], strict=True))

    def _call(self, *command: object) -> Any:
        # On the connection of scripts: an idle supervisor has few.
        return self._broker.connection().call(pack(*command))

    def rescue(
        self, supervisor_id: str, keys: EntryKeys, page: Sequence[tuple[int, bytes, bytes]]
    ) -> int:
        """Put a page of in-flight payloads back to the front of their queue.

        Returns how many were there.

        Args:
            supervisor_id: Whose they were.
            keys: Of their queue.
            page: Number, payload, and what to push, in order.
        """
        args = [part for one in page for part in one]
        names = [self.group.turns, keys.inflight, keys.queue, keys.stats]
        return int(self._broker.run_script("rescue", names, [supervisor_id, *args]))

    def forget(self, supervisor_id: str, of: Sequence[EntryKeys]) -> bool:
        """Take a dead supervisor off the registry; False if something of it is still in flight."""
        keys = [key for one in of for key in (one.inflight, one.head, one.queue)]
        return bool(self._broker.run_script("forget", self._keys + keys, [supervisor_id]))


def new_supervisor_id(kind: str = "") -> str:
    """Return an id that nobody has or had, and that tells people what its process is, and where."""
    host = "".join(c if c.isalnum() or c in "-." else "-" for c in socket.gethostname())
    return "-".join(filter(None, (host, kind, str(os.getpid()), token_hex(4))))


def host_identity() -> str:
    """Return what tells apart machines, their boots, and containers.

    A pid means something only within all three.
    """
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not Linux
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def is_alive(pid: Any) -> bool:
    """Tell whether a process of that number lives on this host.

    If it is another one by now, its lease ends the wait.
    """
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


def keys_of_entry(entry: Mapping[str, Any]) -> list[EntryKeys] | None:
    """Return the keys that an entry names; None if it names none, as entries of older releases."""
    named = entry.get("keys")
    if not isinstance(named, list):
        return None
    found = []
    for one in named:
        names = (
            [one.get(name) for name in ("queue", "head", "inflight", "stats")]
            if isinstance(one, dict)
            else []
        )
        if names and all(isinstance(name, str) for name in names):
            found.append(EntryKeys(*map(str, names)))
    return found


def read_entry(raw: bytes) -> dict[str, Any]:
    """Read a supervisor's entry; one that is no JSON object is empty."""
    try:
        entry = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}
