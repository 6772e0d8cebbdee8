"""What a supervisor and a worker say to each other: frames over a duplex pipe.

Not for what is said to Redis, nor for what a worker shows in shared memory: that is `progress`.
Frames are marshalled: both ends are forks of one interpreter, and payloads stay opaque bytes. A
message in a worker goes by its *row*, a small number that the dispatcher gives it and frees once it
is settled.
"""

import marshal
import os
import select
import struct
import threading
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from wakaq.store.settlement import Action, Settlement

_HEADER = struct.Struct("!I")
_CHUNK = 1 << 18  # bytes read at once


# -- from the supervisor ---------------------------------------------------------------------------


class Assign(NamedTuple):
    """Run these payloads, one after another."""

    supervisor_id: str  # under which the in-flight hash is
    queue: int  # the queue's index in the application; -1: a broadcast
    rows: list[int]
    numbers: list[int]  # under which that hash has them; 0: a broadcast
    payloads: list[bytes]
    is_urgent: bool = False  # a broadcast: ahead of all else


class Recall(NamedTuple):
    """Give back what has not been started."""


class Adopted(NamedTuple):
    """These rows are in flight under another id and other numbers; 0: not ours any more."""

    supervisor_id: str
    rows: list[int]
    numbers: list[int]


class Ping(NamedTuple):
    """Write the time into shared memory, and set the process title anew."""


class Stop(NamedTuple):
    """Exit; nothing is assigned any more."""


# -- from the worker -------------------------------------------------------------------------------


class Ready(NamedTuple):
    """The worker has booted."""


class Failed(NamedTuple):
    """The worker could not boot."""

    reason: str


class Recalled(NamedTuple):
    """These were not started, and will not be."""

    rows: list[int]


class Done(NamedTuple):
    """These returned.

    The sync ones, of these and of those that failed since the last such frame, were `timed` many
    and took `busy` seconds together.
    """

    rows: list[int]
    timed: int
    busy: float


class Outcome(NamedTuple):
    """This one did not just return; the rest is a `Settlement`, in words that can be marshalled."""

    row: int
    action: str
    payload: bytes
    delay: float

    @classmethod
    def of(cls, row: int, settlement: Settlement) -> "Outcome":
        """Make the frame that carries a settlement."""
        return cls(row, settlement.action.value, settlement.payload, settlement.delay)

    @property
    def settlement(self) -> Settlement:
        """The settlement that it carries."""
        return Settlement(Action(self.action), self.payload, self.delay)


Frame = Assign | Recall | Adopted | Ping | Stop | Ready | Failed | Recalled | Done | Outcome
_KINDS: list[Any] = [
    Assign, Recall, Adopted, Ping, Stop, Ready, Failed, Recalled, Done, Outcome,
]  # fmt: skip
_CODES = {kind: code for code, kind in enumerate(_KINDS)}


class Channel:
    """One end of the pipe: whole frames, from any thread.

    The supervisor's end never blocks: what the pipe does not take is kept until `flush`, so that a
    worker that reads nothing, being stopped or stuck in C code, holds nobody up. The worker's end
    blocks when it sends.
    """

    def __init__(self, connection: Connection, *, is_blocking: bool) -> None:
        self.fileno = connection.fileno
        self._connection = connection
        os.set_blocking(connection.fileno(), is_blocking)
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        # The thread that listens only.
        self._received = bytearray()
        # Any thread, under _lock: two threads' frames must not mix.
        self._lock = threading.Lock()
        self._unsent = b""
        self.is_flushed = True

    def send(self, frame: Frame) -> bool:
        """Send a frame; False if a part of it waits for `flush`.

        That the peer is gone is noticed by `receive`, after the last of its frames.
        """
        body = marshal.dumps((_CODES[type(frame)], *frame))
        with self._lock:
            self._unsent += _HEADER.pack(len(body)) + body
        return self.flush()

    def flush(self) -> bool:
        """Send what waits; False if a part of it still does."""
        with self._lock:
            while self._unsent:
                try:
                    sent = os.write(self.fileno(), self._unsent)
                except BlockingIOError:
                    break
                except OSError:  # the peer is gone
                    sent = len(self._unsent)
                self._unsent = self._unsent[sent:]
            self.is_flushed = not self._unsent
            return self.is_flushed

    def close(self) -> None:
        """Close it, but not while another thread writes: its number may then be another file's."""
        with self._lock:
            self._connection.close()

    def is_readable(self) -> bool:
        """Tell whether something has arrived, or the peer is gone."""
        return bool(self._poll.poll(0))

    def receive(self) -> list[Any]:
        """Return the frames that have arrived, none if there is nothing to read.

        Raises:
            EOFError: The peer is gone, and all of its frames were returned.
        """
        if not self.is_readable():
            return []
        try:
            data = os.read(self.fileno(), _CHUNK)
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
