"""Decides what becomes of a claimed payload whose task did not just return.

All of the policy of retries and redeliveries is here, for whoever meets it: a worker, the
supervisor of a worker that died, whoever rescues what a dead supervisor had, and a worker without
supervisor. Not for carrying it out: a turn does that, which settles what was decided here. Nothing
here talks to Redis or changes anything; what is given up, and a task that failed, is logged.

====================  ========================  ==================================================
what happened         function                  settlement
====================  ========================  ==================================================
not a message         `malformed`               DEAD
no such task here     `unknown`                 DELAY with `unknown` + 1; too often: DEAD
redelivered too much  `exhausted`               DEAD, before it runs
deciding failed       `unsettled`               DEAD
it raised             `failed`                  RETRY or DELAY with `retry` + 1; DEAD without a
                                                retry left, or if it is not to be retried
its worker died       `died`                    REDELIVER with `redelivered` + 1; too often: DEAD
hard timeout          `hard_timeout`            DEAD
its supervisor died   `rescued` (a payload)     pushed to the front with `redelivered` + 1
====================  ========================  ==================================================

So `redelivered` counts how often its worker died while it ran, or its supervisor or machine died
while it was in flight; a payload that has it is a suspect, and runs alone. `unknown` counts how
often it was put off until a newer release knows its task; it is dropped once the task has run.

A payload that is nested so deeply that it can be read but not counted is given up as no message
where it would be counted: it could come back for ever. A rescue leaves it as it is.
"""

import logging
import traceback
from contextlib import suppress
from random import getrandbits

from wakaq.errors import NotAMessage, SoftTimeout
from wakaq.message import Message, recount
from wakaq.settings import Policy
from wakaq.store.dead_letter import DeadLetter, Reason
from wakaq.store.settlement import REQUEUE, Action, Settlement

logger = logging.getLogger("wakaq.worker")
UNKNOWN_DELAY = 30.0  # seconds until a task that this release does not know is tried again


# -- before it runs --------------------------------------------------------------------------------


def malformed(payload: bytes, error: Exception, worker: str) -> Settlement:
    """Decide about a payload that is no message."""
    logger.error("A payload is no message, and becomes a dead letter: %s: %r", error, payload[:200])
    return _dead(payload, Reason.NOT_A_MESSAGE, str(error), worker)


def unknown(payload: bytes, message: Message, max_redeliveries: int, worker: str) -> Settlement:
    """Decide about a message whose task is not registered here: a newer release may know it.

    It is no suspect, and this takes none of its redeliveries.
    """
    if message.unknown >= max_redeliveries:
        logger.error("Task %s is unknown, and becomes a dead letter", message.name)
        return _dead(payload, Reason.UNKNOWN_TASK, "", worker)
    try:
        again = recount(payload, unknown=message.unknown + 1)
    except NotAMessage as error:
        return malformed(payload, error, worker)
    logger.warning("Task %s is unknown: trying again in %.0f s", message.name, UNKNOWN_DELAY)
    return _again(again, UNKNOWN_DELAY)


def exhausted(payload: bytes, message: Message, worker: str) -> Settlement:
    """Decide about a message that was redelivered more often than allowed.

    The last time its supervisor or its machine died. These could not give it up, and whoever
    rescues it only counts.
    """
    text = f"its worker, or its machine, died {message.redelivered} times"
    logger.error("Task %s becomes a dead letter: %s", message.name, text)
    return _dead(payload, Reason.REDELIVERED, text, worker)


def is_suspect(payload: bytes) -> bool:
    """Whether a payload has `redelivered`, and so is to run alone.

    Costs almost nothing for a payload without the key.
    """
    if b'"redelivered"' not in payload:
        return False
    try:
        return Message.decode(payload).redelivered > 0
    except NotAMessage:  # whoever runs it makes a dead letter of it
        return False


# -- after it ran ----------------------------------------------------------------------------------


def failed(
    payload: bytes, message: Message, policy: Policy, error: BaseException, worker: str
) -> Settlement:
    """Decide about a message whose task raised; logs it with its traceback."""
    kinds = (type(error), SoftTimeout) if caused_by(error, SoftTimeout) else (type(error),)
    reason = Reason.SOFT_TIMEOUT if SoftTimeout in kinds else Reason.RAISED
    name, retry, most = message.name, message.retry + 1, policy.max_retries
    if retry <= most and any(issubclass(kind, policy.retry_on) for kind in kinds):
        try:
            again = recount(payload, retry=retry, unknown=0)
        except NotAMessage as not_counted:
            return malformed(payload, not_counted, worker)
        delay = _delay_before(policy, retry)
        text = "Task %s failed (%s), retry %d of %d in %.1f s"
        _log(logging.WARNING, error, text, name, reason, retry, most, delay)
        return _again(again, delay)
    text = "Task %s failed (%s), and becomes a dead letter"
    _log(logging.ERROR, error, text, name, reason)
    return _dead(payload, reason, "".join(traceback.format_exception(error)), worker)


def unsettled(payload: bytes, error: BaseException | None, worker: str) -> Settlement:
    """Decide about a message that ran, where deciding about it has failed."""
    text = "".join(traceback.format_exception(error)) if error else "nothing settled it"
    _log(logging.ERROR, error, "A task could not be settled, and becomes a dead letter")
    return _dead(payload, Reason.RAISED, text, worker)


# -- when its process died -------------------------------------------------------------------------


def died(payload: bytes, max_redeliveries: int, cause: str, worker: str) -> Settlement:
    """Decide about a payload whose worker died while it ran; `cause` says how, for people."""
    try:
        message = Message.decode(payload)
    except NotAMessage:  # a bug, as a worker had decoded it; but it must not end the supervisor
        return REQUEUE
    redelivered = message.redelivered + 1
    if redelivered > max_redeliveries:
        text = f"{cause}, {redelivered} times in all"
        logger.error("Task %s becomes a dead letter: %s", message.name, text)
        return _dead(payload, Reason.REDELIVERED, text, worker)
    try:
        return Settlement(Action.REDELIVER, recount(payload, redelivered=redelivered, unknown=0))
    except NotAMessage as error:
        return malformed(payload, error, worker)


def hard_timeout(payload: bytes, stacks: str, worker: str) -> Settlement:
    """Decide about a payload whose worker is killed because it ran past its hard timeout.

    Whoever kills logs it: it knows for how long the task ran.
    """
    return _dead(payload, Reason.HARD_TIMEOUT, stacks, worker)


def rescued(payload: bytes) -> bytes:
    """Return what a dead supervisor's payload is once it was rescued."""
    try:
        return recount(payload, redelivered=Message.decode(payload).redelivered + 1)
    except NotAMessage:  # whoever runs it makes a dead letter of it
        return payload


# -- parts -----------------------------------------------------------------------------------------


def _dead(payload: bytes, reason: Reason, text: str, worker: str) -> Settlement:
    return Settlement(Action.DEAD, DeadLetter(payload, reason, text, worker).encode())


def _again(payload: bytes, delay: float) -> Settlement:
    if not delay:
        return Settlement(Action.RETRY, payload)
    # Delayed payloads are members of a set, in which two equal calls that both failed would become
    # one: white space at its end makes this one equal no other.
    unique = f"{getrandbits(64):064b}".replace("0", " ").replace("1", "\t")
    return Settlement(Action.DELAY, payload + unique.encode(), delay)


def _log(level: int, error: BaseException | None, text: str, *args: object) -> None:
    """Log what failed; the application's handlers, which may raise, do not change a decision."""
    with suppress(Exception):
        logger.log(level, text, *args, exc_info=error)


def _delay_before(policy: Policy, retry: int) -> float:
    try:
        return policy.delay_before(retry)
    # Broad: the application's own function must not turn a retry into a loss.
    except Exception:
        logger.exception("retry_delay failed: trying again at once")
        return 0.0


def caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Whether an error is, or was raised while handling, one of a kind."""
    seen: set[int] = set()  # a chain may be a ring
    while error is not None and id(error) not in seen:
        if isinstance(error, kind):
            return True
        seen.add(id(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False
