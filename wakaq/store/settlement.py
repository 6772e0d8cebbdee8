"""What becomes of a claimed payload: one type, from the worker's outcome to the script's arguments.

Not for deciding which it is: that is `wakaq.worker.outcome`.
"""

from enum import Enum
from typing import NamedTuple


class Action(Enum):
    """The ways to settle a claimed payload; the value is the operation's name in `turn.lua`."""

    ACK = "ack"  # done: forget it
    RETRY = "retry"  # to the end of its queue, as a new payload
    DELAY = "delay"  # due in so many seconds, as a new payload
    REQUEUE = "requeue"  # to the front of its queue, unchanged
    REDELIVER = "redeliver"  # to the front of its queue, as a payload that counts one death more
    DEAD = "dead"  # given up: a dead letter


class Settlement(NamedTuple):
    """A decision about one claimed payload."""

    action: Action
    payload: bytes = b""  # what is pushed: the new payload, or the dead letter; empty for others
    delay: float = 0.0  # seconds, for DELAY


ACK = Settlement(Action.ACK)
REQUEUE = Settlement(Action.REQUEUE)
