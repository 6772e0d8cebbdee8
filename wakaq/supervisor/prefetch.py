"""How much a worker is given ahead, and when it is asked back. Pure functions of a child's record.

Sync tasks: those that take long come one at a time, so that priorities are strict and nothing waits
behind anything. Of short ones a worker has as many as fill a few milliseconds and a round trip to
Redis, so that it never waits; that number grows from 1. Async tasks do not wait behind each other:
up to a limit, all that a worker is given are started.
"""

import math

from wakaq.progress import ROWS
from wakaq.supervisor.child import Child, State

MOST_AHEAD = 512  # sync tasks assigned at once
LONG = 0.05  # seconds; behind a task that has run longer nothing waits
AHEAD = 0.005  # seconds of work that is assigned ahead, besides the round trip to Redis
MOST_ASYNC = ROWS - 2 * MOST_AHEAD  # where `async_concurrency` has no limit


def observe(child: Child, count: int, busy: float) -> None:
    """Learn from `count` sync tasks that took `busy` seconds together."""
    mean, weight = busy / count, min(0.5, 0.1 * count)
    before = mean if child.average is None else child.average
    child.average = before + weight * (mean - before)


def widen(child: Child, given: int) -> None:
    """Let it have twice as many sync tasks next time, if it was given most of what it may have."""
    if 2 * given >= child.window:
        child.window = min(2 * child.window, MOST_AHEAD)


def sync_room(child: Child, now: float, round_trip: float) -> int:
    """Return how many sync tasks to give it now.

    0 while it still has half of what it should have, so that few turns fill it up.
    """
    if not takes_work(child):
        return 0
    count, average = child.sync_count, child.average
    if average is None or average >= LONG:
        return _limit(child, 1 - count)
    if count and runs_long(child, now):
        return 0
    ahead = math.ceil((AHEAD + round_trip) / max(average, 1e-6))
    target = min(1 + ahead, child.window, MOST_AHEAD)
    return 0 if count > target // 2 else _limit(child, target - count)


def async_room(child: Child, limit: int) -> int:
    """Return how many async tasks it can start now; `limit` is `async_concurrency`."""
    if not takes_work(child):
        return 0
    return _limit(child, (limit or MOST_ASYNC) - len(child.async_rows))


def takes_work(child: Child) -> bool:
    """Tell whether it may be given anything at all."""
    is_free = not (child.is_reserved or child.runs_suspect)
    return child.state is State.SERVING and is_free and child.left != 0


def is_idle(child: Child) -> bool:
    """Tell whether a sync task that it is given now starts now."""
    return takes_work(child) and not child.sync_count


def is_blocked(child: Child, now: float) -> bool:
    """Tell whether no sync task can be given to it for a while, because of the one that it has."""
    is_slow = child.average is None or child.average >= LONG
    return child.sync_count > 0 and (is_slow or runs_long(child, now))


def runs_long(child: Child, now: float) -> bool:
    """Tell whether it runs a sync task behind which nothing is to wait."""
    return child.progress.row >= 0 and now - child.progress.started_at > LONG


def has_too_much(child: Child, now: float, round_trip: float) -> bool:
    """Tell whether something waits too long behind the running task, or behind all that wait."""
    waiting = child.sync_count - 1
    if waiting < 1 or child.is_recalling:
        return False
    # Or more than `sync_room` ever gives, so these became longer than they were.
    is_more = waiting > 1 and waiting * (child.average or 0.0) > 2 * LONG + round_trip
    return is_more or runs_long(child, now)


def _limit(child: Child, room: int) -> int:
    return max(0, min(room, len(child.free_rows), ROWS if child.left is None else child.left))
