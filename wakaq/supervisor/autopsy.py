"""Decides what becomes of the payloads of a worker that died. Pure: reads the record, returns settlements.

Not for noticing a death (dispatcher), nor for causing one (timeouts, memory, heartbeat).
"""

from collections.abc import Iterable
from itertools import groupby

from wakaq.errors import NotAMessage
from wakaq.frames import FINISHED, STARTED
from wakaq.letters import HARD_TIMEOUT, REDELIVERED, Letter
from wakaq.message import Message, describe, recount
from wakaq.supervisor.child import Child
from wakaq.turn import Claim, Settlement

HARD = "hard timeout"  # reasons of a Death
SHUTDOWN = "shutdown"


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


def grouped(action: str, claims: Iterable[Claim]) -> list[Settlement]:
    """Settle claims in one way; neighbours in one lane together."""
    lanes = groupby(claims, key=lambda claim: claim.lane)
    return [Settlement(lane, action, [claim.payload for claim in group]) for lane, group in lanes]


def running_tasks(child: Child) -> list[tuple[int, str]]:
    """Return slot and name of each task that the worker is running; any thread may ask."""
    slots = [slot for slot in list(child.assigned) if child.progress.states[slot] == STARTED]
    claims = [(slot, child.assigned.get(slot)) for slot in slots]
    return [(slot, describe(claim.payload)) for slot, claim in claims if claim is not None]


def _judge(child: Child, slot: int, claim: Claim, max_redeliveries: int, worker: str) -> Settlement:
    lane, payload = claim
    death = child.death
    if death and death.reason == HARD:
        if death.slot == slot and death.deadline == child.progress.hard_deadlines[slot]:
            letter = Letter(payload, HARD_TIMEOUT, death.stacks, worker)
            return Settlement(lane, "dead", [payload], letter.encode())
        return Settlement(
            lane, "requeue", [payload]
        )  # it shared its worker with the task that was meant
    if death and death.reason == SHUTDOWN:
        return Settlement(lane, "requeue", [payload])
    try:
        message = Message.decode(payload)
    except (
        NotAMessage
    ):  # decoded by the worker, so not to be: but a garbled one must not end the dispatcher
        return Settlement(lane, "requeue", [payload])
    redelivered = message.redelivered + 1
    if redelivered > max_redeliveries:
        cause = death.reason if death else "its worker died"
        letter = Letter(payload, REDELIVERED, f"{cause}, {redelivered} times in all", worker)
        return Settlement(lane, "dead", [payload], letter.encode())
    return Settlement(lane, "redeliver", [payload], recount(payload, redelivered=redelivered))
