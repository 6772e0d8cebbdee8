"""How long until work goes on after something died: a worker, a supervisor, a machine, Redis.

A machine is lost by killing all that ran on it while workers that call themselves another host are
there to notice.
"""

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import machine
from benchmarks.session import PEERS, Session

WAKAQ = PEERS["wakaq"]
# Redis is to keep what it accepted.
DURABLE = ("--save", "", "--appendonly", "yes", "--appendfsync", "always")
LONG, OUTAGE = 1.0, 3.0


def _session() -> Session:
    return Session(WAKAQ, 10, server_options=DURABLE)


def _wait_for_start(session: Session, since: float, within: float) -> float:
    """Wait until task 0 starts after a moment; return how long after it that was."""
    machine.wait_until(
        "the task starts", lambda: session.marks.started(0, 1)[0] > since, within=within
    )
    return session.marks.started(0, 1)[0] - since


def _title(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().strip("\0")


def _kill_and_reap(session: Session, pids: list[int]) -> None:
    """Kill processes, the supervisor among them; nobody may take its remains for a life."""
    machine.send_signal(pids, signal.SIGKILL)
    session.workers.pop().wait()


def _begin(session: Session) -> float:
    """Start workers and one long task; return when it is known to run."""
    session.start_workers()
    session.enqueue(1, seconds=LONG)
    _wait_for_start(session, 0, 10)
    # Titles and reports need an instant, too.
    time.sleep(0.1)
    return time.monotonic()


def worker_killed() -> float:
    """Kill the worker that runs a task: until that task runs again."""
    with _session() as session:
        killed = _begin(session)
        busy = [pid for pid in session.pids() if " running " in _title(pid)]
        machine.send_signal(busy, signal.SIGKILL)
        return _wait_for_start(session, killed, 30)


def supervisor_killed() -> float:
    """Kill a supervisor and start one again: until the next task runs.

    Orphans end the tasks they have.
    """
    with _session() as session:
        session.start_workers()
        # Two run, and one waits: task 0.
        session.enqueue(2, first=1, seconds=LONG)
        machine.wait_until("both run", lambda: all(session.marks.started(1, 3)), 10)
        session.enqueue(1)
        killed = time.monotonic()
        _kill_and_reap(session, [session.workers[0].pid])
        session.spawn()
        return _wait_for_start(session, killed, 60)


def all_killed() -> float:
    """Kill a supervisor with all its workers and start it again.

    Until the task that ran runs again.
    """
    with _session() as session:
        killed = _begin(session)
        _kill_and_reap(session, session.pids())
        session.spawn()
        return _wait_for_start(session, killed, 60)


def machine_lost() -> float:
    """Kill all of one host while another host serves the same queue.

    Until the task that ran runs again.
    """
    with _session() as session:
        session.start_workers()
        lost = session.pids()
        session.enqueue(1, seconds=LONG * 5)
        _wait_for_start(session, 0, 10)
        session.spawn(BENCH_HOST="another-host")
        machine.wait_until("two supervisors", lambda: len(session.pids()) >= 2 * len(lost), 20)
        time.sleep(1)
        killed = time.monotonic()
        machine.send_signal(lost, signal.SIGKILL)
        return _wait_for_start(session, killed, 60)


def redis_restarted() -> float:
    """Kill Redis with a task in its queue and start it again.

    From its first answer until that task runs.
    """
    with _session() as session:
        session.start_workers()
        session.pause()
        # One may be fetched by a call that was under way, the other waits through the outage.
        session.enqueue(2)
        session.server.stop()
        session.resume()
        time.sleep(OUTAGE)
        session.server.start()
        answered = time.monotonic()
        session.marks.wait(2, 60)
        return max(session.marks.started(0, 2)) - answered


CASES: dict[str, Callable[[], float]] = {
    "worker killed": worker_killed,
    "supervisor killed, restarted": supervisor_killed,
    "supervisor and workers killed, restarted": all_killed,
    "machine lost": machine_lost,
    "Redis killed, restarted": redis_restarted,
}


def measure(rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every round."""
    results: dict[str, list[float]] = {}
    for number in range(rounds):
        for what, case in CASES.items():
            print(f"recovery, round {number + 1} of {rounds}: {what}", file=sys.stderr)
            results.setdefault(what, []).append(case())
    return results
