"""How late delayed tasks start.

Single ones on an idle machine, and many that are due at one instant.
"""

import statistics
import sys
import time
from datetime import UTC, datetime

from benchmarks.session import PEERS, Peer, Session
from benchmarks.table import Figures, percentile

DELAY = 2.0
BURST = 10_000


def singles(peer: Peer, scale: float) -> Figures:
    """Delay tasks by two seconds each, 50 a second, and see how late each starts.

    Early ones are below zero.
    """
    count = max(40, int(200 * scale))
    with Session(peer, count + 1) as session:
        session.start_workers(delayed=True)
        sent = session.enqueue(count, every=0.02, delay=DELAY)["sent"]
        session.marks.wait(count, 60)
        started = session.marks.started(0, count)
    late = [(end - begin - DELAY) * 1000 for begin, end in zip(sent, started, strict=True)]
    return {
        "late_min": min(late),
        "late_p50": statistics.median(late),
        "late_p99": percentile(late, 99),
    }


def burst(peer: Peer, scale: float) -> Figures:
    """Enqueue many tasks that are all due at one instant, and see how late they start.

    That instant lies after the last call.
    """
    count = min(peer.tasks, int(BURST * scale))
    with Session(peer, count + 1) as session:
        session.start_workers(delayed=True)
        # The slowest producer makes a thousand such calls a second.
        ahead = 3 + count / 1000
        due = time.monotonic() + ahead
        session.enqueue(count, at=datetime.now(UTC).timestamp() + ahead)
        if time.monotonic() > due:
            print(f"{peer.name}: some were due before they were enqueued", file=sys.stderr)
        session.marks.wait(count, 120)
        late = [(start - due) * 1000 for start in session.marks.started(0, count)]
    return {"burst": count, "burst_p50": statistics.median(late), "burst_p99": percentile(late, 99)}


def measure(names: list[str], rounds: int, scale: float) -> dict[str, dict[str, list[float]]]:
    """Return every figure of every round, the peers taking turns."""
    results: dict[str, dict[str, list[float]]] = {}
    for number in range(rounds):
        for peer in (PEERS[name] for name in names):
            print(f"delayed, round {number + 1} of {rounds}: {peer.name}", file=sys.stderr)
            for figure, value in (singles(peer, scale) | burst(peer, scale)).items():
                results.setdefault(peer.name, {}).setdefault(figure, []).append(value)
    return results
