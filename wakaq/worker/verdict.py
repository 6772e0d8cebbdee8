"""Decides what becomes of a task that did not just return: retry, delay or dead letter. Pure, for sync and async alike."""

import logging
import traceback
from random import getrandbits
from typing import NamedTuple

from wakaq.errors import SoftTimeout
from wakaq.letters import NOT_A_MESSAGE, RAISED, REDELIVERED, SOFT_TIMEOUT, UNKNOWN_TASK, Letter
from wakaq.message import Message, recount
from wakaq.settings import Policy

logger = logging.getLogger("wakaq.worker")
UNKNOWN_DELAY = 30.0  # seconds until a task that this release does not know is tried again


class Verdict(NamedTuple):
    """An action of `turn.Settlement`, with what it needs."""

    action: str
    new: bytes
    delay: float = 0.0


def garbled(payload: bytes, error: Exception, worker: str) -> Verdict:
    """Judge a payload that is no message."""
    logger.error("A payload is no message, and becomes a dead letter: %s: %r", error, payload[:200])
    return Verdict("dead", Letter(payload, NOT_A_MESSAGE, str(error), worker).encode())


def unknown(payload: bytes, message: Message, max_redeliveries: int, worker: str) -> Verdict:
    """Judge a message whose task is not registered here: a newer release may know it."""
    if message.redelivered >= max_redeliveries:
        logger.error("Task %s is unknown, and becomes a dead letter", message.name)
        return Verdict("dead", Letter(payload, UNKNOWN_TASK, "", worker).encode())
    logger.warning("Task %s is unknown: trying again in %.0f s", message.name, UNKNOWN_DELAY)
    return _again(recount(payload, redelivered=message.redelivered + 1), UNKNOWN_DELAY)


def worn_out(payload: bytes, message: Message, worker: str) -> Verdict:
    """Judge a message whose supervisors or machines died under it too often."""
    text = f"its worker, or its machine, died {message.redelivered} times"
    logger.error("Task %s becomes a dead letter: %s", message.name, text)
    return Verdict("dead", Letter(payload, REDELIVERED, text, worker).encode())


def failed(
    payload: bytes, message: Message, policy: Policy, error: BaseException, worker: str
) -> Verdict:
    """Judge a task that raised; logs it with its traceback."""
    kinds = (type(error), SoftTimeout) if caused_by(error, SoftTimeout) else (type(error),)
    reason = SOFT_TIMEOUT if SoftTimeout in kinds else RAISED
    name, retry, most = message.name, message.retry + 1, policy.max_retries
    if retry <= most and any(issubclass(kind, policy.retry_on) for kind in kinds):
        delay = _delay(policy, retry)
        text = "Task %s failed (%s), retry %d of %d in %.1f s"
        logger.warning(text, name, reason, retry, most, delay, exc_info=error)
        return _again(recount(payload, retry=retry), delay)
    logger.error("Task %s failed (%s), and becomes a dead letter", name, reason, exc_info=error)
    text = "".join(traceback.format_exception(error))
    return Verdict("dead", Letter(payload, reason, text, worker).encode())


def _again(new: bytes, delay: float) -> Verdict:
    if not delay:
        return Verdict("retry", new)
    # Delayed payloads are members of a set, in which two equal calls that both failed would become one: white space at
    # its end makes this one equal no other.
    unique = f"{getrandbits(64):064b}".replace("0", " ").replace("1", "\t")
    return Verdict("delay", new + unique.encode(), delay)


def _delay(policy: Policy, retry: int) -> float:
    try:
        return policy.delay_before(retry)
    # Broad: the application's own function must not turn a retry into a loss.
    except Exception:
        logger.exception("retry_delay failed: trying again at once")
        return 0.0


def caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Whether an error is, or was raised while handling, one of a kind."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, kind):
            return True
        seen.add(id(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False
