"""Decides what becomes of a task that did not just return: retry, delay or dead letter. Pure, for sync and async alike."""

import logging
import traceback
from random import getrandbits
from typing import NamedTuple

from wakaq.errors import ConfigError, SoftTimeout
from wakaq.letters import NOT_A_MESSAGE, RAISED, SOFT_TIMEOUT, UNKNOWN_TASK, Letter
from wakaq.message import Message, recount
from wakaq.settings import Policy

logger = logging.getLogger("wakaq.worker")
_BLANKS = str.maketrans("01", " \t")
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
    return Verdict(
        "delay", _single(recount(payload, redelivered=message.redelivered + 1)), UNKNOWN_DELAY
    )


def failed(
    payload: bytes, message: Message, policy: Policy, error: BaseException, worker: str
) -> Verdict:
    """Judge a task that raised; logs it with its traceback."""
    is_soft = caused_by(error, SoftTimeout)
    is_retryable = isinstance(error, policy.retry_on) or (
        is_soft and issubclass(SoftTimeout, policy.retry_on)
    )
    reason = SOFT_TIMEOUT if is_soft else RAISED
    if is_retryable and message.retry < policy.max_retries:
        retry = message.retry + 1
        delay = _delay(policy, retry)
        logger.warning(
            "Task %s failed (%s), retry %d of %d in %.1f s",
            message.name,
            reason,
            retry,
            policy.max_retries,
            delay,
            exc_info=error,
        )
        new = recount(payload, retry=retry)
        return Verdict("delay", _single(new), delay) if delay else Verdict("retry", new)
    logger.error(
        "Task %s failed (%s), and becomes a dead letter", message.name, reason, exc_info=error
    )
    text = "".join(traceback.format_exception(error))
    return Verdict("dead", Letter(payload, reason, text, worker).encode())


def _single(payload: bytes) -> bytes:
    """Return the payload as one that equals no other, by white space at its end.

    Delayed payloads are members of a set, in which two equal calls that both failed would become one.
    """
    return payload + f"{getrandbits(64):064b}".translate(_BLANKS).encode()


def _delay(policy: Policy, retry: int) -> float:
    try:
        return policy.delay_before(retry)
    # Broad: the application's own function must not turn a retry into a loss.
    except (Exception, ConfigError):
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
