"""What a supervisor and its worker say to each other: frames over a socket pair, and a progress row in shared memory.

Not for what is said to Redis. Frames are marshalled: both ends run the same interpreter, and payloads stay opaque bytes.
A message in a worker goes by its *slot*, a small number that the dispatcher gives it and frees once it is settled.
"""

import marshal
import socket
import struct
import threading
from multiprocessing.sharedctypes import RawArray
from typing import Any, NamedTuple

SLOTS = 2_048  # More than a worker is ever assigned at once: see MOST_AHEAD in `supervisor.child`, and async_concurrency.
_HEADER = struct.Struct("!I")
_CHUNK = 1 << 18


class Assign(NamedTuple):
    """Run these payloads, which are in one lane, one after another; a broadcast's queue is -1."""

    queue: int
    lane: int
    slots: list[int]
    payloads: list[bytes]
    is_urgent: bool = False  # a broadcast: ahead of all else


class Recall(NamedTuple):
    """Give back what has not been started."""


class Ping(NamedTuple):
    """Write the time into the progress row, and say in the title what is running."""


class Stop(NamedTuple):
    """Exit; nothing is assigned any more."""


class Ready(NamedTuple):
    """The worker has booted."""


class Done(NamedTuple):
    """These tasks returned. `timed` sync ones, of these and of those that failed, took `busy` seconds together."""

    slots: list[int]
    timed: int
    busy: float


class Outcome(NamedTuple):
    """A task did not just return: `action`, `new` and `delay` are those of a `turn.Settlement`."""

    slot: int
    action: str
    new: bytes
    delay: float


class Recalled(NamedTuple):
    """The answer to a Recall: these were not started, and will not be."""

    slots: list[int]


class Failed(NamedTuple):
    """The worker could not boot."""

    reason: str


_KINDS: list[Any] = [Assign, Recall, Ping, Stop, Ready, Done, Outcome, Recalled, Failed]
_CODES = {kind: code for code, kind in enumerate(_KINDS)}


class Channel:
    """One end of the socket pair: whole frames, from any thread.

    The supervisor's end never blocks: what the socket does not take is kept until `flush`, so that a worker that reads
    nothing, being stopped or stuck in C code, holds nobody up. The worker's end blocks.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._received = bytearray()
        # Any thread, under _lock: two threads' frames must not mix.
        self._lock = threading.Lock()
        self._unsent = b""

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, frame: tuple[Any, ...]) -> bool:
        """Send a frame; False if a part of it waits for `flush`. A peer that is gone is noticed by `receive`."""
        body = marshal.dumps((_CODES[type(frame)], tuple(frame)))
        with self._lock:
            self._unsent += _HEADER.pack(len(body)) + body
            return self._flush()

    def flush(self) -> bool:
        with self._lock:
            return self._flush()

    @property
    def is_flushed(self) -> bool:
        return not self._unsent

    def _flush(self) -> bool:
        while self._unsent:
            try:
                sent = self.sock.send(self._unsent)
            except BlockingIOError:
                return False
            except OSError:  # The peer is gone. The reading side learns it as the end of the stream, after the last frames.
                self._unsent = b""
                return True
            self._unsent = self._unsent[sent:]
        return True

    def receive(self, *, wait: bool = False) -> list[Any]:
        """Return the frames that have arrived; with `wait`, block until there is something.

        Raises:
            EOFError: The peer is gone, and all that it had sent was returned before.
        """
        try:
            data = self.sock.recv(_CHUNK, 0 if wait else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            raise EOFError
        received = self._received
        received += data
        frames, start = [], 0
        while len(received) - start >= _HEADER.size:
            (length,) = _HEADER.unpack_from(received, start)
            end = start + _HEADER.size + length
            if len(received) < end:
                break
            code, fields = marshal.loads(memoryview(received)[start + _HEADER.size : end])  # noqa: S302 - ours, see above
            frames.append(_KINDS[code]._make(fields))
            start = end
        del received[:start]
        return frames

    def close(self) -> None:
        self.sock.close()


FREE, ASSIGNED, STARTED, FINISHED = range(4)  # what Progress.states holds


class Progress:
    """What a worker is doing, in memory that outlives it: readable while it hangs in C code, and after a SIGKILL.

    The worker alone writes, but for `states`, which the dispatcher sets before it assigns a slot. No lock: each field is
    one aligned word, and a reader that needs two of them reads the first again.
    """

    _FIELDS = 4

    def __init__(self, memory: Any = None) -> None:
        # The array itself has to live as long as the views, and is what travels to the worker.
        self.memory = RawArray("d", self._FIELDS + SLOTS // 8 + SLOTS) if memory is None else memory
        view = memoryview(self.memory).cast("B")
        head = self._FIELDS * 8
        self._fields = view[:head].cast("d")
        self.states = view[head : head + SLOTS]
        # By slot, since many async tasks run at once; 0.0: none.
        self.hard_deadlines = view[head + SLOTS :].cast("d")
        if memory is None:
            self._fields[1] = -1.0

    # When the control thread last answered; monotonic, as are all moments here.
    @property
    def pong_at(self) -> float:
        return self._fields[0]

    @pong_at.setter
    def pong_at(self, value: float) -> None:
        self._fields[0] = value

    # The slot that the main thread runs, or -1.
    @property
    def slot(self) -> int:
        return int(self._fields[1])

    @property
    def started_at(self) -> float:
        return self._fields[2]

    @property
    def soft_deadline(self) -> float:
        return self._fields[3]

    @soft_deadline.setter
    def soft_deadline(self, value: float) -> None:
        self._fields[3] = value

    def begin(self, slot: int, now: float, soft: float | None, hard: float | None) -> None:
        """Note the start of a sync task; limits in seconds."""
        fields = self._fields
        self.states[slot] = STARTED
        self.hard_deadlines[slot] = now + hard if hard else 0.0
        fields[2] = now
        fields[1] = slot
        # Last: whoever finds it passed finds this task's slot.
        fields[3] = now + soft if soft else 0.0

    def end(self) -> None:
        """Note that no sync task is running; the deadline first, so that it is never found with the next task's slot."""
        fields = self._fields
        fields[3] = 0.0
        fields[1] = -1.0
