"""Supervisors, a producer, and what attacks them by a schedule that a seed decides."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from proxy import Proxy

HERE = Path(__file__).parent
STEADY_RUNS = 0.25  # share of them
SLOTS = 3  # supervisors
TERM = 3.0  # seconds of a lease
ALL = "all"


@dataclass(frozen=True)
class Attack:
    """What was done to whom: `slot` is a supervisor's place, or `ALL`."""

    began_at: float
    ended_at: float
    slot: str
    what: str


class Place:
    """One supervisor after another, at one place, with a proxy of its own between it and Redis."""

    def __init__(self, slot: int, folder: Path, address: tuple[str, int]) -> None:
        self.slot = str(slot)
        self._folder = folder
        self.proxy = Proxy(address)
        self.process: subprocess.Popen[bytes] | None = None
        self.sessions: list[int] = []  # of all that ever ran here

    def start(self, host: str) -> None:
        environment = {
            "REDIS_URL": f"redis://127.0.0.1:{self.proxy.port}",
            "CHAOS_SLOT": self.slot,
        }
        with (self._folder / f"supervisor-{self.slot}.log").open("ab") as log:
            command = [sys.executable, str(HERE / "launch.py"), str(TERM), host, "app.wakaq"]
            self.process = subprocess.Popen(
                command,
                cwd=self._folder,
                env=os.environ | environment | {"PYTHONPATH": _paths(self._folder)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.sessions.append(self.process.pid)

    def pids(self) -> dict[int, str]:
        """Return all live processes that were ever started here, with their titles."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.getsid(int(entry.name)) in self.sessions:
                    title = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                    if title:  # else it is a zombie
                        found[int(entry.name)] = title.decode(errors="replace").strip()
        return found

    def zombies(self) -> list[str]:
        """Return the processes of this place that ended, and were not reaped within two seconds."""
        for _ in range(20):
            found = []
            for entry in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    if os.getsid(int(entry.name)) in self.sessions:
                        stat = (entry / "stat").read_text()
                        found += [stat] if stat.rpartition(") ")[2][0] == "Z" else []
            if not found:
                break
            time.sleep(0.1)
        return found

    def pick(self, kind: str, chance: random.Random) -> int | None:
        """Return the pid of a worker, the supervisor or the fork server."""
        titles = self.pids().items()
        prefix = {"worker": "wakaq-worker: worker ", "fork server": "wakaq-worker: fork server"}
        if kind == "supervisor":
            return self.process.pid if self.process and self.process.poll() is None else None
        pids = sorted(pid for pid, title in titles if title.startswith(prefix[kind]))
        return chance.choice(pids) if pids else None


def _paths(folder: Path) -> str:
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))


@dataclass
class Fleet:
    """All of it; a context manager that leaves no process behind."""

    folder: Path
    server: Any
    chance: random.Random
    attacks: list[Attack] = field(default_factory=list)
    accepted: dict[str, str] = field(default_factory=dict)  # number -> kind
    same: int = 0  # calls without any argument, all equal

    def __enter__(self) -> Self:
        shutil.copy(HERE / "app_source.py", self.folder / "app.py")
        self.marks = self.folder / "marks"
        self.marks.touch()
        (self.folder / "memory").mkdir()
        os.environ |= {
            "CHAOS_MARKS": str(self.marks),
            "CHAOS_MEMORY": str(self.folder / "memory"),
        }
        self.stack = contextlib.ExitStack()
        self.places = []
        for slot in range(SLOTS):
            place = Place(slot, self.folder, ("127.0.0.1", self.server.port))
            self.stack.enter_context(place.proxy)
            self.places.append(place)
        self.stack.callback(self.kill_all)
        for place in self.places:
            place.start(f"host-{place.slot}")
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    @staticmethod
    def proc(pid: int) -> Path:
        return Path(f"/proc/{pid}")

    def kill_all(self) -> None:
        while left := [pid for place in self.places for pid in place.pids()]:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for place in self.places:
                if place.process:
                    place.process.wait()

    # -- the producer ------------------------------------------------------------------------------

    def produce(self, app: ModuleType, until: Callable[[], bool], rate: float) -> None:
        """Enqueue a mixture of tasks, and count those that Redis accepted."""
        chance = random.Random(self.chance.random())
        number = 0
        # In some runs most take longer than a worker is given tasks ahead for.
        if is_steady := chance.random() < STEADY_RUNS:
            rate /= 2
        while not until():
            number += 1
            with contextlib.suppress(app.OUTAGES):
                self._enqueue(app, str(number), chance, is_steady=is_steady)
            time.sleep(chance.expovariate(rate))

    def _enqueue(
        self, app: ModuleType, number: str, chance: random.Random, *, is_steady: bool
    ) -> None:
        kinds = {"work": 55, "wait": 15, "same": 15, "long": 3, "eta": 5, "flaky": 5, "doomed": 1}
        kind = chance.choices([*kinds, "stuck"], [*kinds.values(), 0.1])[0]
        queue = chance.choice(["high", "low", "low"])
        match kind:
            case "work" | "long":
                seconds = 0.08 if is_steady else chance.uniform(0, 0.004)
                if kind == "long":
                    seconds = chance.uniform(0.1, 1.5)
                app.work.delay(number, seconds, queue=queue)
            case "eta":
                app.work.delay(
                    number, 0.0, queue=queue, eta=timedelta(seconds=chance.uniform(0.1, 3))
                )
            case "wait":
                app.wait.delay(number, chance.uniform(0.0, 0.3), queue=queue)
            case "same":
                app.same.delay(queue=queue)
                self.same += 1
                return
            case _:
                getattr(app, kind).delay(number, queue=queue)
        self.accepted[number] = kind

    # -- attacks -----------------------------------------------------------------------------------

    def attack(self, until: float) -> None:
        """Do one thing after another; returns when all is mended again."""
        while time.monotonic() < until:
            self.respawn()
            time.sleep(self.chance.uniform(0.1, 0.8))
            attack = self.chance.choices(list(ATTACKS), list(ATTACKS.values()))[0]
            place = self.chance.choice(self.places)
            began_at = time.monotonic()
            slot = attack(self, place, self.chance)
            what = attack.__name__.strip("_")
            self.attacks.append(Attack(began_at, time.monotonic(), slot, what))
        self.mend()

    def mend(self) -> None:
        for place in self.places:
            for pid in place.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        self.respawn()

    def respawn(self) -> None:
        for place in self.places:
            if place.process and place.process.poll() is not None:
                # On the host of the one before, or, as after the loss of a machine, on another.
                host = f"host-{place.slot}"
                place.start(host if self.chance.random() < 0.5 else f"{host}-{time.monotonic()}")

    def background(self, run: Callable[[], None], seconds: float) -> None:
        timer = threading.Timer(seconds, run)
        timer.start()
        self.stack.callback(timer.join)


def _signal(kind: str, number: signal.Signals) -> Callable[..., str]:
    def attack(_fleet: Fleet, place: Place, chance: random.Random) -> str:
        if pid := place.pick(kind, chance):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return place.slot

    attack.__name__ = f"{number.name} to a {kind}"
    return attack


def _stop(kind: str, shortest: float, longest: float) -> Callable[..., str]:
    def attack(fleet: Fleet, place: Place, chance: random.Random) -> str:
        seconds = chance.uniform(shortest, longest)
        if pid := place.pick(kind, chance):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)

            def resume() -> None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

            fleet.background(resume, seconds)
        return place.slot

    attack.__name__ = f"SIGSTOP for up to {longest} s to a {kind}"
    return attack


def _restart_redis(fleet: Fleet, _place: Place, chance: random.Random) -> str:
    chance.choice([fleet.server.stop, fleet.server.kill])()
    time.sleep(chance.uniform(0, 2))
    fleet.server.start()
    return ALL


def _stop_redis(fleet: Fleet, _place: Place, chance: random.Random) -> str:
    fleet.server.process.send_signal(signal.SIGSTOP)
    time.sleep(chance.uniform(0.1, 4))
    fleet.server.process.send_signal(signal.SIGCONT)
    return ALL


def _flush_scripts(fleet: Fleet, _place: Place, _chance: random.Random) -> str:
    with contextlib.closing(fleet.server.client()) as client:
        client.script_flush()
    return ALL


def _cut(_fleet: Fleet, place: Place, _chance: random.Random) -> str:
    place.proxy.cut()
    return place.slot


def _cut_after(_fleet: Fleet, place: Place, chance: random.Random) -> str:
    place.proxy.cut_after(chance.randrange(1, 3000))
    return place.slot


def _stall(_fleet: Fleet, place: Place, chance: random.Random) -> str:
    place.proxy.stall(chance.uniform(0.1, 5))
    return place.slot


def _freeze(_fleet: Fleet, place: Place, _chance: random.Random) -> str:
    place.proxy.freeze()
    return place.slot


def _cut_replies(_fleet: Fleet, place: Place, chance: random.Random) -> str:
    place.proxy.cut_replies(chance.uniform(0.5, 5))
    return place.slot


def _delay(_fleet: Fleet, place: Place, chance: random.Random) -> str:
    place.proxy.delay(chance.uniform(0.1, 3))
    return place.slot


ATTACKS: dict[Callable[..., str], float] = {
    _signal("worker", signal.SIGKILL): 6,
    _signal("worker", signal.SIGTERM): 1,
    _stop("worker", 0.1, 3): 3,
    _signal("supervisor", signal.SIGKILL): 3,
    _signal("supervisor", signal.SIGTERM): 2,
    _stop("supervisor", 0.1, 8): 2,
    _signal("fork server", signal.SIGKILL): 1,
    _stop("fork server", 0.1, 2): 1,
    _restart_redis: 1,
    _stop_redis: 1,
    _flush_scripts: 1,
    _cut: 3,
    _cut_after: 6,
    _cut_replies: 4,
    _stall: 3,
    _delay: 2,
    _freeze: 2,
}


def marks(path: Path) -> Iterator[tuple[str, str, str, int, float]]:
    """Read what the tasks noted: what, number, slot, pid, moment."""
    for line in path.read_text().splitlines():
        what, number, slot, pid, at = line.split()
        yield what, number, slot, int(pid), float(at)
