"""What a supervisor and its worker say to each other: frames over a socket pair, and a progress row in shared memory.

Not for what is said to Redis. Frames are marshalled: both ends run the same interpreter, and payloads stay opaque bytes.
A message in a worker goes by its *slot*, a small number that the dispatcher gives it and frees once it is settled.
"""

# ruff: noqa: UP014 - classes for all of the frames would take five times the lines
import marshal
import socket
import struct
import threading
from multiprocessing.sharedctypes import RawArray
from operator import setitem
from typing import Any, NamedTuple

SLOTS = 2_048  # more than a worker is ever assigned at once
FREE, ASSIGNED, STARTED, FINISHED = range(4)  # what Progress.states holds
_HEADER = struct.Struct("!I")
_CHUNK = 1 << 18


class Assign(NamedTuple):
    """Run these payloads, which are in one lane, one after another; a broadcast's queue is -1."""

    queue: int
    lane: int
    slots: list[int]
    payloads: list[bytes]
    is_urgent: bool = False  # a broadcast: ahead of all else


Recall = NamedTuple("Recall", [])  # give back what has not been started
Ping = NamedTuple("Ping", [])  # write the time into the progress row, and the title anew
Stop = NamedTuple("Stop", [])  # exit; nothing is assigned any more

Ready = NamedTuple("Ready", [])  # the worker has booted
Failed = NamedTuple("Failed", [("reason", str)])  # it could not
Recalled = NamedTuple("Recalled", [("slots", list[int])])  # were not started, and will not be
# These returned; `timed` sync ones, of these and of those that failed, took `busy` seconds together.
Done = NamedTuple("Done", [("slots", list[int]), ("timed", int), ("busy", float)])
# This did not just return; `action`, `new` and `delay` are those of a `turn.Settlement`.
Outcome = NamedTuple("Outcome", [("slot", int), ("action", str), ("new", bytes), ("delay", float)])

_KINDS: list[Any] = [Assign, Recall, Ping, Stop, Ready, Done, Outcome, Recalled, Failed]
_CODES = {kind: code for code, kind in enumerate(_KINDS)}


class Channel:
    """One end of the socket pair: whole frames, from any thread.

    The supervisor's end never blocks: what the socket does not take is kept until `flush`, so that a worker that reads
    nothing, being stopped or stuck in C code, holds nobody up. The worker's end blocks.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.fileno, self.close = sock.fileno, sock.close
        self._sock = sock
        self._received = bytearray()
        # Any thread, under _lock: two threads' frames must not mix.
        self._lock = threading.Lock()
        self._unsent = b""
        self.is_flushed = True

    def send(self, frame: tuple[Any, ...]) -> bool:
        """Send a frame; False if a part of it waits for `flush`. A peer that is gone is noticed by `receive`."""
        body = marshal.dumps((_CODES[type(frame)], *frame))
        with self._lock:
            self._unsent += _HEADER.pack(len(body)) + body
        return self.flush()

    def flush(self) -> bool:
        """Send what waits; False if a part of it still does."""
        with self._lock:
            while self._unsent:
                try:
                    sent = self._sock.send(self._unsent)
                except BlockingIOError:
                    break
                except OSError:  # The peer is gone. `receive` tells so after the last frames.
                    sent = len(self._unsent)
                self._unsent = self._unsent[sent:]
            self.is_flushed = not self._unsent
            return self.is_flushed

    def receive(self) -> list[Any]:
        """Return the frames that have arrived; raise EOFError when the peer is gone and all of its frames were returned."""
        try:
            data = self._sock.recv(_CHUNK, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            raise EOFError
        received = self._received
        received += data
        frames, start = [], _HEADER.size
        while len(received) >= start:
            end = start + _HEADER.unpack_from(received, start - _HEADER.size)[0]
            if len(received) < end:
                break
            code, *fields = marshal.loads(memoryview(received)[start:end])  # noqa: S302 - ours, see above
            frames.append(_KINDS[code](*fields))
            start = end + _HEADER.size
        del received[: start - _HEADER.size]
        return frames


def _word(index: int) -> Any:
    """Return a property for one word of the progress row."""
    return property(
        lambda self: self._words[index],
        lambda self, value: setitem(self._words, index, value),
    )


class Progress:
    """What a worker is doing, in memory that outlives it: readable while it hangs in C code, and after a SIGKILL.

    The worker alone writes, but for `states`, which the dispatcher sets before it assigns a slot. No lock: each word is
    aligned, and a reader that needs two of them reads the first again. Moments are monotonic.
    """

    _WORDS = 4

    pong_at = _word(0)  # when the control thread last answered, or was made
    started_at = _word(2)  # of the sync task, as is the deadline
    soft_deadline = _word(3)  # 0.0: none

    def __init__(self, memory: Any = None) -> None:
        # The array itself has to live as long as the views, and is what travels to the worker.
        self.memory = memory or RawArray("d", self._WORDS + SLOTS // 8 + SLOTS)
        view = memoryview(self.memory).cast("B")
        head = self._WORDS * 8
        self._words = view[:head].cast("d")
        self.states = view[head : head + SLOTS]
        # By slot, since many async tasks run at once; 0.0: none.
        self.hard_deadlines = view[head + SLOTS :].cast("d")
        if memory is None:
            self.end()

    @property
    def slot(self) -> int:
        """The slot of the sync task that is running, or -1."""
        return int(self._words[1])

    def begin(self, slot: int, now: float, soft: float | None, hard: float | None) -> None:
        """Note the start of a sync task; limits in seconds."""
        words = self._words
        self.states[slot] = STARTED
        self.hard_deadlines[slot] = now + hard if hard else 0.0
        words[2] = now
        words[1] = slot
        # Last: whoever finds it passed finds this task's slot.
        words[3] = now + soft if soft else 0.0

    def end(self) -> None:
        """Note that no sync task is running; the deadline first, so that it is never found with the next task's slot."""
        self._words[3] = 0.0
        self._words[1] = -1.0
