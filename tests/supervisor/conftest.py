"""Parts of a supervisor around a process that only sleeps; what it is told is done for real."""

import contextlib
import itertools
import multiprocessing
import os
import selectors
import signal
import subprocess
import tempfile
import time
from multiprocessing import resource_tracker

import pytest

from wakaq import WakaQ
from wakaq.channel import Channel, Done, Ready
from wakaq.message import Message
from wakaq.progress import SIZE, Progress
from wakaq.service import Outage
from wakaq.store.settlement import Action
from wakaq.store.turns import Claim
from wakaq.supervisor.child import Child, State
from wakaq.supervisor.dispatcher import Dispatcher
from wakaq.supervisor.fork_server import Endpoints


class Record(Child):
    """A Child with the worker's end of its channel, and short ways to a state."""

    numbers = itertools.count(1)

    def __init__(self, slot, command, queue, *, is_leader=True):
        self.process = subprocess.Popen(
            command, process_group=0 if is_leader else None, stdout=subprocess.PIPE
        )
        ours, theirs = multiprocessing.Pipe()
        with tempfile.TemporaryFile() as shared, tempfile.TemporaryFile() as stacks:
            os.ftruncate(shared.fileno(), SIZE)
            progress = Progress(shared.fileno())
            progress.end()
            endpoints = Endpoints(
                Channel(ours, is_blocking=False), progress, os.dup(stacks.fileno())
            )
        super().__init__(slot, self.process.pid, endpoints)
        self.theirs = Channel(theirs, is_blocking=True)
        self.queue = queue

    @property
    def claims(self):
        """What it has, in order of assignment."""
        return list(self.assigned.values())

    def have(self, *names, is_async=False, **counts):
        """Assign messages of these names; returns their rows."""
        payloads = [Message(name, [], {}, **counts).encode() for name in names]
        claims = [Claim(self.queue, payload, next(self.numbers)) for payload in payloads]
        return self.assign(claims, is_async=is_async)

    def run(self, *names, now=0.0, soft=None, hard=None, **counts):
        """Assign messages, and begin the first."""
        rows = self.have(*names, **counts)
        self.progress.begin(rows[0], now, soft, hard)
        return rows

    def end(self):
        """End the process; returns its status."""
        self.process.kill()
        return self.process.wait(5)

    def discard(self):
        self.end()
        self.process.stdout.close()
        self.theirs.close()
        if not self._is_reaped:
            self.reap()
        close_memory(self.progress)


def close_memory(progress):
    """Close shared memory now, and not when pytest forgets the test: it has a descriptor, too."""
    for view in (progress.states, progress.hard_deadlines, progress._words):
        view.release()
    progress._memory.close()


class Clock:
    """Stands in for the module `time` somewhere: a clock that the test moves."""

    def __init__(self, now):
        self.now = now

    def monotonic(self):
        return self.now


def new_app(*, has_async=False, **options):
    """Return an application with the queues high and low, and one task, or one of each kind."""
    app = WakaQ(**{"queues": [(0, "high"), (1, "low")]} | options)

    @app.task
    def sync(): ...

    if has_async:

        @app.task
        async def coroutine(): ...

    return app


@pytest.fixture
def app():
    return new_app(max_redeliveries=2)


@pytest.fixture
def make_app():
    return new_app


@pytest.fixture
def redis_app(app_url):
    """The same, on the session's server."""
    app = new_app(url=app_url, wait_timeout=0.1, concurrency=2)
    with contextlib.closing(app.broker):
        yield app


@pytest.fixture
def frozen():
    """Have a server's process do nothing for a block, as on a machine that swaps."""

    @contextlib.contextmanager
    def frozen(server):
        server.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            server.process.send_signal(signal.SIGCONT)

    return frozen


@pytest.fixture
def outage():
    return Outage()


@pytest.fixture
def clock():
    return Clock(time.monotonic())


@pytest.fixture(name="close_memory")
def close_memory_fixture():
    return close_memory


@pytest.fixture
def end_resource_tracker():
    """Return a function that ends the process that spawning has left to `multiprocessing`."""

    def end():
        if resource_tracker._resource_tracker._pid is not None:
            resource_tracker._resource_tracker._stop()

    return end


@pytest.fixture
def make_child(app):
    """`make_child(slot)` returns a serving `Record`; its process runs a command that lasts."""
    with contextlib.ExitStack() as stack:

        def make(slot=1, *command, is_leader=True):
            child = Record(slot, command or ("sleep", "60"), app.queues[-1], is_leader=is_leader)
            stack.callback(child.discard)
            child.state, child.has_served = State.SERVING, True
            return child

        yield make


@pytest.fixture
def child(make_child):
    return make_child()


class Stage:
    """A dispatcher whose thread is the test, and which says nothing to Redis unless it is started.

    `changed` are the children that the main thread was told of.
    """

    def __init__(self, app, make_child):
        self.app = app
        self.make_child = make_child
        self.changed = []
        self.outage = Outage()
        self.dispatcher = Dispatcher(app, self.outage, self.changed.append)
        self.group = self.dispatcher.groups[0]
        self.number = itertools.count(1)
        self.threads = []

    def start(self):
        """Register, and start the threads that talk to Redis."""
        self.dispatcher.register()
        self.start_threads()

    def start_threads(self):
        for group in self.dispatcher.groups:
            self.threads += (group.sender, *group.wakers)
        for thread in self.threads:
            thread.start()

    def stop(self):
        """End these threads."""
        for thread in self.threads:
            thread.stop()
        for thread in self.threads:
            thread.join(5)

    def close(self):
        self.stop()
        mailbox = self.dispatcher._mailbox
        self.dispatcher._selector.close()
        os.close(mailbox._reader)
        os.close(mailbox._writer)
        self.app.broker.close()

    # -- workers ---------------------------------------------------------------------------------

    def join(self, slot=1, *, is_ready=True):
        """Have a worker join."""
        child = self.make_child(slot)
        child.queue = self.app.queues[-1]
        child.state, child.has_served = State.STARTING, False
        self.dispatcher.join_child(child)
        if is_ready:
            self.say(child, Ready())
        return child

    def say(self, child, *frames):
        """Have the dispatcher hear what a worker says."""
        for frame in frames:
            child.theirs.send(frame)
        self.dispatcher._attend(child, selectors.EVENT_READ)

    def finish(self, child, *rows, busy=0.2):
        """Have a worker report tasks as done, all that it has unless they are given."""
        rows = rows or tuple(child.assigned)
        timed = sum(row not in child.async_rows for row in rows)
        self.say(child, Done(list(rows), timed, busy * timed))

    def die(self, child):
        child.theirs.close()
        self.dispatcher._attend(child, selectors.EVENT_READ)

    # -- claims ----------------------------------------------------------------------------------

    def claims(self, *payloads, queue=None):
        queue = queue or self.app.queues[-1]
        return [Claim(queue, payload, next(self.number)) for payload in payloads]

    def hand_out(self, *payloads):
        """Have payloads handed out that were just claimed; returns their claims."""
        claims = self.claims(*payloads)
        self.dispatcher._hand_out(claims)
        self.step()
        return claims

    def acked(self):
        """Return the claims that were acked since the last call."""
        done = self.group.inflight.done
        claims = done.copy()
        done.clear()
        return claims

    def settled(self):
        """Return what was decided otherwise since the last call: action and claim."""
        decided = self.group.inflight.settlements
        found = [(settlement.action, claim) for claim, settlement in decided]
        decided.clear()
        return found

    def requeued(self):
        """Return what goes back, nothing else being decided, in the order of its numbers."""
        settled = self.settled()
        assert {action for action, _ in settled} <= {Action.REQUEUE}
        return sorted((claim for _, claim in settled), key=lambda claim: claim.number)

    def step(self):
        """Do a step that does not wait."""
        self.dispatcher.post(lambda: None)
        self.dispatcher._step()

    def step_until(self, is_true, within=10.0):
        deadline = time.monotonic() + within
        while not is_true():
            assert time.monotonic() < deadline, "it did not happen"
            self.dispatcher.post(time.sleep, 0.001)
            self.dispatcher._step()


@pytest.fixture
def make_stage(make_child):
    """`make_stage(**options)` returns a `Stage` for an application, perhaps with async tasks."""
    with contextlib.ExitStack() as stack:

        def make(*, has_async=False, **options):
            stage = Stage(new_app(has_async=has_async, **options), make_child)
            stack.callback(stage.close)
            return stage

        yield make


@pytest.fixture
def stage(make_stage):
    return make_stage()
