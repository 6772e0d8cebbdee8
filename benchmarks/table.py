"""The table of all peers: enqueue, drain, what each task costs, pick-up, and what idling costs."""

import itertools
import statistics
import sys
import time
from typing import Any

from benchmarks import machine
from benchmarks.session import PEERS, Peer, Session

Figures = dict[str, float]
PRODUCED = 10_000


def percentile(values: list[float], percent: float) -> float:
    """Return the value that this percentage of values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


class Costs:
    """What workers and server have used up to now."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._before = self._read()

    def _read(self) -> list[float]:
        session, server = self._session, self._session.server
        parent = machine.cpu([session.workers[0].pid])
        used = [machine.cpu(session.pids()), server.cpu(), server.commands(), server.reads()]
        return [time.monotonic(), parent, *used]

    def per_task(self, tasks: int) -> Figures:
        """Return what so many tasks have cost since then."""
        spent = [after - before for before, after in zip(self._before, self._read(), strict=True)]
        seconds, parent, workers, redis, commands, reads = spent
        return {
            "drain": tasks / seconds,
            "worker_cpu": workers / tasks * 1000,
            "redis_cpu": redis / tasks * 1000,
            "commands": commands / tasks,
            "reads": reads / tasks,
            "parent_share": parent / seconds,
        }


def _finish(session: Session, first: int, tasks: int) -> None:
    """Wait until every task has run and Redis holds none, waiting or in flight."""
    session.marks.wait(first + tasks, 300, first)
    keys, server = session.description["keys"], session.server
    machine.wait_until("Redis is empty", lambda: not server.left(keys), 30)
    if doubles := session.marks.doubles(first, first + tasks):
        print(f"{session.peer.name}: {doubles} tasks ran more than once", file=sys.stderr)


def drain(session: Session, tasks: int, first: int = 0, **spec: Any) -> Figures:
    """Let warm workers drain a queue that filled while they were stopped.

    From the moment when they may go on.
    """
    session.pause()
    session.enqueue(tasks, first=first, bulk=session.peer.has_bulk, **spec)
    costs = Costs(session)
    session.resume()
    _finish(session, first, tasks)
    return costs.per_task(tasks)


def drain_full(peer: Peer, tasks: int, **spec: Any) -> Figures:
    """Start workers on a full queue, and measure from when a tenth is done.

    Not by stopping warm ones meanwhile, which some peers take for dead then, and start more than
    were asked for.
    """
    with Session(peer, tasks) as session:
        session.enqueue(tasks, bulk=peer.has_bulk, **spec)
        session.spawn()
        machine.wait_until("a tenth is done", lambda: session.marks.done() > tasks // 10, 60)
        done, costs = session.marks.done(), Costs(session)
        _finish(session, 0, tasks)
        return costs.per_task(tasks - done)


def pick_up(session: Session, first: int, count: int) -> Figures:
    """Measure from before the call that enqueues until the task starts, one at a time."""
    sent = session.enqueue(count, first=first, every=0.03)["sent"]
    session.marks.wait(first + count, 30, first)
    started = session.marks.started(first, first + count)
    waits = [(end - begin) * 1000 for begin, end in zip(sent, started, strict=True)]
    return {"pick_up_p50": statistics.median(waits), "pick_up_p99": percentile(waits, 99)}


def produce(peer: Peer, scale: float) -> Figures:
    """Measure one producer alone."""
    tasks = int(peer.tasks * scale)
    with Session(peer, tasks) as session, session.pinned():
        figures = {"enqueue": session.enqueue(min(int(PRODUCED * scale), tasks))["rate"]}
        if peer.has_bulk:
            figures["bulk"] = session.enqueue(tasks, bulk=True)["rate"]
        return figures


def idle(peer: Peer, scale: float) -> Figures:
    """Measure workers that have nothing to do, and then one task at a time."""
    picked = max(50, int(300 * scale))
    with Session(peer, picked + 1) as session:
        session.start_workers()
        time.sleep(2)
        figures = {"pss": machine.pss(session.pids())}
        figures["connections"] = session.server.connections()
        return figures | pick_up(session, 0, picked)


def consume(peer: Peer, scale: float) -> Figures:
    """Measure workers on a full queue."""
    tasks = int(peer.tasks * scale)
    figures = drain_full(peer, tasks)
    figures["drain_1kb"] = drain_full(peer, tasks, size=1024)["drain"]
    return figures


def measure(names: list[str], rounds: int, scale: float) -> dict[str, dict[str, list[float]]]:
    """Return every figure of every round, the peers taking turns.

    What takes little time is compared within minutes, and next to the floors, since the machine's
    mood of the moment is a large part of it: so all peers do one part before the next, and the
    producers' part comes three times.
    """
    results: dict[str, dict[str, list[float]]] = {}
    parts = (produce, produce, produce, idle, consume)
    for number, part in itertools.product(range(rounds), parts):
        for name in sorted(names, key=lambda name: PEERS[name].is_rival):
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr)
            for figure, value in part(PEERS[name], scale).items():
                results.setdefault(name, {}).setdefault(figure, []).append(value)
    return {name: results[name] for name in names}
