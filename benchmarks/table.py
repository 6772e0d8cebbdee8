"""The table of all peers: enqueue, drain, what each task costs, pick-up, and what idling costs."""

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


def drain(session: Session, tasks: int, first: int = 0, **spec: Any) -> Figures:
    """Let warm workers drain a queue that filled while they were stopped.

    The clock runs from the moment they may go on until every task has run and Redis holds none, waiting or in flight.
    """
    keys, server, parent = session.description["keys"], session.server, [session.workers[0].pid]
    session.pause()
    session.enqueue(tasks, first=first, bulk=session.peer.has_bulk, **spec)
    used, parent_used = machine.cpu(session.pids()), machine.cpu(parent)
    redis_used, commands, reads = server.cpu(), server.commands(), server.reads()
    started = session.resume()
    session.marks.wait(first + tasks, 300, first)
    machine.wait_until("Redis is empty", lambda: not server.left(keys), 30)
    seconds = time.monotonic() - started
    reads = server.reads() - reads
    commands, redis_used = server.commands() - commands, server.cpu() - redis_used
    used, parent_used = machine.cpu(session.pids()) - used, machine.cpu(parent) - parent_used
    if doubles := session.marks.doubles(first, first + tasks):
        print(f"{session.peer.name}: {doubles} tasks ran more than once", file=sys.stderr)
    return {
        "drain": tasks / seconds,
        "worker_cpu": used / tasks * 1000,
        "redis_cpu": redis_used / tasks * 1000,
        "commands": commands / tasks,
        "reads": reads / tasks,
        "parent_share": parent_used / seconds,
    }


def pick_up(session: Session, first: int, count: int) -> Figures:
    """Measure from before the call that enqueues until the task starts, one at a time, on an idle machine."""
    sent = session.enqueue(count, first=first, every=0.03)["sent"]
    session.marks.wait(first + count, 30, first)
    started = session.marks.started(first, first + count)
    waits = [(end - begin) * 1000 for begin, end in zip(sent, started, strict=True)]
    return {"pick_up_p50": statistics.median(waits), "pick_up_p99": percentile(waits, 99)}


def one_round(peer: Peer, scale: float) -> Figures:
    """Measure everything once, on a fresh server."""
    tasks, picked = int(peer.tasks * scale), max(50, int(300 * scale))
    with Session(peer, tasks * 2 + picked + 1) as session:
        produced = min(int(PRODUCED * scale), tasks)
        with session.pinned():
            figures: Figures = {"enqueue": session.enqueue(produced)["rate"]}
            if peer.has_bulk:
                figures["bulk"] = session.enqueue(tasks, bulk=True)["rate"]
        session.server.client.flushall()
        session.start_workers()
        figures |= drain(session, tasks)
        figures["drain_1kb"] = drain(session, tasks, tasks, size=1024)["drain"]
        time.sleep(2)
        figures["pss"] = machine.pss(session.pids())
        figures["connections"] = session.server.connections()
        return figures | pick_up(session, tasks * 2, picked)


def measure(names: list[str], rounds: int, scale: float) -> dict[str, dict[str, list[float]]]:
    """Return every figure of every round, the peers taking turns."""
    results: dict[str, dict[str, list[float]]] = {}
    for number in range(rounds):
        for name in names:
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr)
            for figure, value in one_round(PEERS[name], scale).items():
                results.setdefault(name, {}).setdefault(figure, []).append(value)
    return results
