"""The supervisor's record of a worker, around a process that only sleeps; what it is told to do is done for real."""

import contextlib
import itertools
import os
import socket
import subprocess
import tempfile
from multiprocessing.sharedctypes import RawArray

import pytest

from wakaq import WakaQ
from wakaq.frames import STARTED, Channel, Progress
from wakaq.message import Message
from wakaq.supervisor.child import Child
from wakaq.turn import Claim, Lane

# Shared memory is kept for the next one who asks, with its descriptors: have enough of it before the check for leaks.
RawArray("d", 1 << 18)


class Sleeper:
    """What a Child needs of a process, in a group of its own."""

    def __init__(self, command=("sleep", "60")):
        self._popen = subprocess.Popen(command, process_group=0)
        self.pid = self._popen.pid
        self.sentinel = -1

    @property
    def exitcode(self):
        return self._popen.poll()

    def join(self, timeout):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(timeout)

    def end(self):
        self._popen.kill()
        self._popen.wait()


class Record(Child):
    """A Child with the worker's end of its channel, and short ways to a state."""

    serial = 0

    def __hash__(self):
        return self.serial  # so that a set of them has the same order in every run

    def __init__(self, number, process, queues):
        ours, theirs = socket.socketpair()
        ours.settimeout(0)
        stacks = tempfile.TemporaryFile(mode="a+b")  # noqa: SIM115 - closed with the child
        super().__init__(number, process, Channel(ours), Progress(), os.dup(stacks.fileno()))
        stacks.close()
        self.theirs = Channel(theirs)
        self.lanes = [Lane("me", queue, number, f"lane:{queue.name}:{number}") for queue in queues]
        self.is_ready = True

    def have(self, *names, is_async=False, queue=-1, **counts):
        """Assign messages of these names; returns their slots."""
        payloads = [Message(name, [], {}, **counts).encode() for name in names]
        slots = self.assign([Claim(self.lanes[queue], payload) for payload in payloads])
        if is_async:
            self.async_slots.update(dict.fromkeys(slots, 1.0))
        return slots

    def run(self, *names, now=0.0, soft=None, hard=None, **counts):
        """Assign messages, and begin the first."""
        slots = self.have(*names, **counts)
        self.progress.begin(slots[0], now, soft, hard)
        assert self.progress.states[slots[0]] == STARTED
        return slots

    def discard(self):
        self.process.end()
        self.theirs.close()
        if not self._is_reaped:
            self.reap()


@pytest.fixture
def app():
    app = WakaQ(queues=[(0, "high"), (1, "low")], max_redeliveries=2)

    @app.task
    def sync(): ...

    @app.task
    async def coroutine(): ...

    return app


@pytest.fixture
def make_child(app):
    """`make_child(number)` returns a ready `Record`; its process runs a command that lasts."""
    serials = itertools.count()
    with contextlib.ExitStack() as stack:

        def make(number=1, *command):
            child = Record(number, Sleeper(command) if command else Sleeper(), app.queues)
            child.serial = next(serials)
            stack.callback(child.discard)
            return child

        yield make


@pytest.fixture
def child(make_child):
    return make_child()
