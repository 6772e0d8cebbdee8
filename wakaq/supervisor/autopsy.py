"""Says how a worker ended, and what becomes of the payloads it had. Pure: reads the record, returns settlements.

Not for noticing a death (dispatcher), nor for causing one (timeouts, memory, heartbeat).
"""

import signal
import time

from wakaq.errors import NotAMessage
from wakaq.frames import FINISHED, STARTED
from wakaq.letters import HARD_TIMEOUT, REDELIVERED, Letter
from wakaq.message import Message, recount
from wakaq.supervisor.child import Child
from wakaq.turn import Claim, Settlement, grouped

SHUTDOWN = "shutdown"  # reason of a Death, as HARD_TIMEOUT
_LOST_STATUS = 255  # what multiprocessing tells when the fork server, which knew, is gone


def settle(child: Child, max_redeliveries: int, worker: str) -> list[Settlement]:
    """Ack what was finished, judge what was running, requeue what was not started, in an order fit for one turn."""
    finished, waiting, running = [], [], []
    for slot, claim in child.assigned.items():
        state = child.progress.states[slot]
        if state == FINISHED:
            finished.append(claim)
        elif state == STARTED:
            running.append(_judge(child, slot, claim, max_redeliveries, worker))
        else:
            waiting.append(claim)
    # Each push to the front goes before the last one: so the first to run again is what was running.
    return [*grouped("done", finished), *reversed(grouped("requeue", waiting)), *reversed(running)]


def describe_end(child: Child, status: int | None) -> str:
    """Return a worker's end in one sentence: pid, cause, how long it lived, what it was running, its memory."""
    parts = [f"{child} {_cause(status)} after {time.monotonic() - child.spawned_at:.1f} s"]
    if child.death:
        parts.append(f"by us, because of: {child.death.reason}")
    if child.victims:
        parts.append(f"while it ran {child.victims}")
    if child.rss:
        parts.append(f"last seen with {child.rss // 1_000_000} MB")
    return ", ".join(parts)


def _cause(status: int | None) -> str:
    if status is None or status == _LOST_STATUS:
        return "ended, nobody knows how"
    if status >= 0:
        return f"exited with status {status}"
    known = -status in set(signal.Signals)
    return f"was killed by {signal.Signals(-status).name if known else f'signal {-status}'}"


def _judge(child: Child, slot: int, claim: Claim, max_redeliveries: int, worker: str) -> Settlement:
    lane, payload = claim
    requeue = Settlement(lane, "requeue", [payload])
    death = child.death
    if death and death.reason == HARD_TIMEOUT:
        if death.slot != slot or death.deadline != child.progress.hard_deadlines[slot]:
            return requeue  # it shared its worker with the task that was meant
        letter = Letter(payload, HARD_TIMEOUT, death.stacks, worker)
        return Settlement(lane, "dead", [payload], letter.encode())
    try:
        redelivered = Message.decode(payload).redelivered + 1
    except NotAMessage:  # decoded by the worker, so not to be: but it must not end the dispatcher
        return requeue
    if death and death.reason == SHUTDOWN:
        return requeue
    if redelivered > max_redeliveries:
        cause = death.reason if death else "its worker died"
        letter = Letter(payload, REDELIVERED, f"{cause}, {redelivered} times in all", worker)
        return Settlement(lane, "dead", [payload], letter.encode())
    return Settlement(lane, "redeliver", [payload], recount(payload, redelivered=redelivered))
