"""Says how a worker ended, and what becomes of the payloads it had.

Pure: reads the child's record and returns settlements. Not for noticing a death (dispatcher), nor
for causing one (`Child.kill`: timeouts, memory, heartbeat, main), nor for reaping (main thread).

================================  ==================================================================
state of a row (`progress`)       what becomes of its payload
================================  ==================================================================
FINISHED                          ACK
STARTED                           REDELIVER or DEAD, as `outcome.died` has it, but
                                  - DEAD if it is the task that was killed by its hard timeout;
                                  - REQUEUE if another task was, or the supervisor shuts down
ASSIGNED, FREE                    REQUEUE: not begun; or settled otherwise, which nobody was told
================================  ==================================================================
"""

import signal
import time

from wakaq.progress import FINISHED, STARTED
from wakaq.store.dead_letter import Reason
from wakaq.store.settlement import ACK, REQUEUE, Settlement
from wakaq.store.turns import Claim
from wakaq.supervisor.child import Child
from wakaq.worker.outcome import died, hard_timeout

SHUTDOWN = "shutdown"  # reason of a Death: what was running is put back, and nothing is counted


def settlements(child: Child, max_redeliveries: int, worker: str) -> list[tuple[Claim, Settlement]]:
    """Return what becomes of each payload that a dead worker had, in an order fit for one turn.

    Each push to the front of a queue goes before the last one. So what was running comes last, and
    runs first.
    """
    finished: list[tuple[Claim, Settlement]] = []
    unstarted: list[tuple[Claim, Settlement]] = []
    running: list[tuple[Claim, Settlement]] = []
    for row, claim in child.assigned.items():
        state = child.progress.states[row]
        if state == FINISHED:
            finished.append((claim, ACK))
        elif state == STARTED:
            settlement = _interrupted(child, row, claim.payload, max_redeliveries, worker)
            running.append((claim, settlement))
        else:
            unstarted.append((claim, REQUEUE))
    return [*finished, *reversed(unstarted), *reversed(running)]


def _interrupted(
    child: Child, row: int, payload: bytes, max_redeliveries: int, worker: str
) -> Settlement:
    death = child.death
    if death is None:
        return died(payload, max_redeliveries, "its worker died", worker)
    if death.reason == Reason.HARD_TIMEOUT:
        is_meant = death.row == row and death.deadline == child.progress.hard_deadlines[row]
        return hard_timeout(payload, death.stacks, worker) if is_meant else REQUEUE
    if death.reason == SHUTDOWN:
        return REQUEUE
    return died(payload, max_redeliveries, death.reason, worker)


def describe_end(child: Child, status: int | None) -> str:
    """Return a worker's end in one sentence.

    It names pid, cause, how long the worker lived, what it was running, and its memory.
    """
    parts = [f"{child} {_cause(status)} after {time.monotonic() - child.spawned_at:.1f} s"]
    if child.death:
        parts.append(f"by us, because of: {child.death.reason}")
    if child.was_running:
        parts.append(f"while it ran {child.was_running}")
    if child.rss:
        parts.append(f"last seen with {child.rss // 1_000_000} MB")
    return ", ".join(parts)


def _cause(status: int | None) -> str:
    """Say a process's status as people do; None if nobody was told."""
    if status is None:
        return "ended, nobody knows how"
    if status >= 0:
        return f"exited with status {status}"
    known = -status in set(signal.Signals)
    return f"was killed by {signal.Signals(-status).name if known else f'signal {-status}'}"
