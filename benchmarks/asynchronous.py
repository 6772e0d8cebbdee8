"""Sleeping async tasks, a hundred at once in each of two processes, beside other queues."""

import sys

from benchmarks.session import PEERS, Peer, Session
from benchmarks.table import drain

NAMES = ("wakaq", "arq", "saq", "streaq", "taskiq (list)", "taskiq (stream)")
TASKS, SECONDS, SLOTS, PROCESSES = 2_000, 0.1, 100, 2
IDEAL = SLOTS * PROCESSES / SECONDS


def one_round(peer: Peer) -> dict[str, float]:
    """Return tasks a second, and the share of what the slots allow."""
    with Session(peer, TASKS + 1, processes=PROCESSES, slots=SLOTS) as session:
        session.start_workers()
        rate = drain(session, TASKS, seconds=SECONDS)["drain"]
    return {"async": rate, "async_share": rate / IDEAL}


def measure(names: list[str], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return every figure of every round, the peers taking turns."""
    results: dict[str, dict[str, list[float]]] = {}
    for number in range(rounds):
        for name in names:
            print(f"async, round {number + 1} of {rounds}: {name}", file=sys.stderr)
            for figure, value in one_round(PEERS[name]).items():
                results.setdefault(name, {}).setdefault(figure, []).append(value)
    return results
