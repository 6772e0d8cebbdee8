"""What a worker is doing, in memory that outlives it.

It can be read while the worker hangs in C code, and after a SIGKILL.
Not for what is said between the two processes: that is `channel`.

A message has a row from its assignment until the dispatcher has heard what became of it, and the
row has a state:

========  ==================================================  ============================
state     meaning                                             written by
========  ==================================================  ============================
FREE      decided; `Outcome` may not have been sent           worker, before `Outcome`
ASSIGNED  on its way to the worker, or waiting there          dispatcher, before `Assign`
STARTED   running                                             worker, before the task
FINISHED  returned; `Done` may not have been sent             worker, before `Done`
========  ==================================================  ============================

A state, FREE above all, means something only while the row is assigned: in other rows it is what
was left there. So when a worker is gone and its last frames were read, the rows tell of each of its
messages whether to ack, to redeliver or to requeue it.
"""

import mmap
from operator import setitem
from typing import Any

ROWS = 2_048  # more messages than a worker is ever assigned at once
FREE, ASSIGNED, STARTED, FINISHED = range(4)
_WORDS = 4
SIZE = _WORDS * 8 + ROWS + ROWS * 8  # bytes


def _word(index: int) -> Any:
    """Return a property for one of the words at the start."""
    return property(
        lambda self: self._words[index],
        lambda self, value: setitem(self._words, index, value),
    )


class Progress:
    """A view of the memory that a supervisor and one worker share.

    Moments are monotonic, which is system-wide. No lock: each word is aligned, and a reader that
    needs two of them reads the first again.
    """

    # When a ping was last answered, by whichever thread of the worker listens; first, when the
    # control thread was made.
    pong_at = _word(0)
    started_at = _word(2)  # of the sync task, as is the deadline
    soft_deadline = _word(3)  # 0.0: none

    def __init__(self, file: int) -> None:
        self._memory = mmap.mmap(file, SIZE)
        view = memoryview(self._memory)
        head = _WORDS * 8
        self._words = view[:head].cast("d")
        self.states = view[head : head + ROWS]
        # By row, since many async tasks run at once; 0.0: none.
        self.hard_deadlines = view[head + ROWS :].cast("d")

    @property
    def row(self) -> int:
        """The row of the sync task that is running, or -1."""
        return int(self._words[1])

    def begin(self, row: int, now: float, soft: float | None, hard: float | None) -> None:
        """Note the start of a sync task; limits in seconds. Between tasks there are none."""
        words = self._words
        self.states[row] = STARTED
        if hard:
            self.hard_deadlines[row] = now + hard
        words[2] = now
        words[1] = row
        # Last: whoever finds it passed finds this task's row.
        if soft:
            words[3] = now + soft

    def end(self, row: int | None = None) -> None:
        """Note that no sync task is running: that of a row has ended, or none has begun yet.

        The deadlines go first, so that they are never found with the next task in this row, or with
        the next task's row.
        """
        if row is not None:
            self.hard_deadlines[row] = 0.0
        self._words[3] = 0.0
        self._words[1] = -1.0
