"""The main thread: starts, reaps and replaces workers, and handles signals.

Not for claims: those are the dispatcher's.
"""

import contextlib
import functools
import logging
import resource
import selectors
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from operator import itemgetter
from typing import Any

from wakaq.app import WakaQ
from wakaq.scheduler import Scheduler
from wakaq.service import Mailbox, Outage, Service, crash
from wakaq.store.connection import backoff
from wakaq.supervisor.broadcast import Broadcast
from wakaq.supervisor.child import Child, Death, State
from wakaq.supervisor.dispatcher import Dispatcher
from wakaq.supervisor.fork_server import Broken, Ended, Endpoints, Forked, ForkServer, Started
from wakaq.supervisor.heartbeat import Heartbeat
from wakaq.supervisor.lease import Identity, Lease
from wakaq.supervisor.memory import Memory, rss
from wakaq.supervisor.promoter import Promoter
from wakaq.supervisor.timeouts import Timeouts
from wakaq.supervisor.worker_exit import SHUTDOWN, describe_end
from wakaq.titles import set_title

logger = logging.getLogger("wakaq.supervisor")

BOOT_FAILED = 3  # exit status: workers cannot be started
MOST_TASKS_SHOWN = 20  # of a worker
SWITCH_EVERY = 0.0005  # seconds for which one thread may keep others from running
TITLE_EVERY = 1.0  # seconds
EXIT_GRACE = 10.0  # seconds that a worker has to exit after its last task
SETTLE_GRACE = 10.0  # seconds for the last settlements at shutdown, if Redis is away
STATUS_GRACE = 1.0  # seconds between a worker's end and the fork server's word of its exit status
STACKS_AFTER = 0.3  # seconds in which workers write their stacks
SHORTEST_LIFE = 0.5  # seconds between two starts of one worker
LONGEST_DELAY = 30.0  # seconds between starts of what dies while it starts
START_WITHIN = 60.0  # seconds that a worker has for the hooks of its start
FORK_WITHIN = 2.0  # seconds that the fork server has to fork a worker
MOST_FORKING = 16  # workers at once
IMPORT_WITHIN = 60.0  # seconds that another fork server has to import the application
# In a row that could not start, after which nothing heals if no worker is left.
MOST_FORK_SERVERS = 5


class Supervisor:
    """The parent process that `wakaq-worker` runs: forks its fork server when it is made.

    To be made before there are other threads, and closed.
    """

    def __init__(self, app: WakaQ, path: str, *, with_scheduler: bool = False) -> None:
        # Fixed.
        self._app = app
        self._settings = settings = app.settings
        self._path = path

        # Any thread.
        self._mailbox = Mailbox()

        # Main thread only; the list is replaced, never changed, so that others can read it.
        self._children: list[Child] = []
        self._fork_server = ForkServer(app, path)
        self._wanted: deque[int] = deque()  # slots for which a worker is to be forked
        self._forking: dict[
            int, tuple[Endpoints, float]
        ] = {}  # by slot, with when it was asked for
        # When it was started, if it has not said yet that it can serve.
        self._fork_server_since = 0.0
        self._failed_fork_servers = 0  # in a row
        self._statuses: dict[int, int] = {}  # of workers that have ended, by pid
        self._reaping: set[Child] = set()  # gone, and nobody has said yet how
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._mailbox, selectors.EVENT_READ)
        self._selector.register(self._fork_server, selectors.EVENT_READ)
        self._is_told = False  # that memory is too short for any worker
        self._has_booted = False
        self._boot_failures = 0
        self._is_draining = False
        self._alarms: list[tuple[float, Callable[[], None]]] = []  # when to do what
        self._exit_status = 0

        # The threads.
        outage, post = Outage(), self._mailbox.post
        broker = app.broker
        self._dispatcher = dispatcher = Dispatcher(
            app, outage, lambda child: post(self._look_after, child)
        )
        # Those that bring work, and end first; then those that guard it, and end last.
        self._bringing: list[Service] = [
            *(Promoter(broker, group, outage) for group in broker.groups),
            Broadcast(broker, lambda one: dispatcher.post(dispatcher.broadcast, one), outage),
        ]
        if with_scheduler:
            self._bringing.append(Scheduler(app, broker, lambda _: None, outage))
        children = self._read_children
        self._heartbeat = Heartbeat(
            children, lambda child: dispatcher.post(dispatcher.flush_later, child), outage
        )
        self._guarding: list[Service] = [
            Lease(app, self._identities, self._describe_children, outage),
            self._heartbeat,
            Timeouts(children, outage),
        ]
        self._memory: Memory | None = None
        if (limit := settings.max_mem_percent) is not None:
            self._memory = Memory(
                children, lambda one: dispatcher.post(dispatcher.retire_child, one), limit, outage
            )
            self._guarding.append(self._memory)

    # -- read by other threads ---------------------------------------------------------------------

    def _read_children(self) -> list[Child]:
        return self._children

    def _identities(self) -> Sequence[Identity]:
        """Return what this supervisor is in each slot group (lease thread)."""
        return [
            Identity(
                group.registry,
                group.inflight.supervisor_id,
                group.inflight.former_id,
                group.inflight.turn_number,
            )
            for group in self._dispatcher.groups
        ]

    def _describe_children(self) -> list[dict[str, Any]]:
        """Return what workers do, as the registry holds it (lease thread)."""
        now, entries = time.monotonic(), []
        for child in self._children:
            child.rss = rss(child)
            tasks = [
                {"name": call, "seconds": round(now - at, 1)}
                for _, at, call in islice(child.running(), MOST_TASKS_SHOWN)
            ]
            entry = {"number": child.slot, "pid": child.pid, "rss": child.rss, "tasks": tasks}
            entries.append(entry | {"is_silent": child in self._heartbeat.silent})
        return entries

    # -- life --------------------------------------------------------------------------------------

    def run(self) -> int:
        """Supervise until a signal, or a failure that cannot heal; return the exit status.

        Raises:
            redis.RedisError: Redis cannot be reached at the start.
        """
        if policy := self._app.broker.risk_of_eviction():
            logger.warning("Redis may drop tasks: maxmemory-policy is %s, set noeviction", policy)
        self._dispatcher.register()
        self._app.broker.close()  # this thread's connections: it has no more to ask
        _allow_many_descriptors()
        # A thread that has an answer of Redis in hand must not wait for 5 ms, Python's default,
        # until another lets it.
        sys.setswitchinterval(SWITCH_EVERY)
        for one in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1):
            signal.signal(one, lambda received, _: self._mailbox.post(self._obey, received))
        try:
            self._dispatcher.start()
            for service in (*self._guarding, *self._bringing):
                service.start()
            logger.info("Started with %d workers for %s", self._settings.concurrency, self._path)
            self._tend()
            for slot in range(1, self._settings.concurrency + 1):
                self._after(0.0, self._spawn, slot)
            while not self._is_draining or self._children or self._reaping:
                self._step()
            self._finish()
        except BaseException:  # noqa: BLE001 - whatever it is
            crash("The supervisor")
        return self._exit_status

    def close(self) -> None:
        """End the fork server; what it has forked lives on."""
        self._fork_server.close()
        self._selector.close()

    def _step(self) -> None:
        at, call = min(self._alarms, key=itemgetter(0))
        for key, _ in self._selector.select(max(0.0, at - time.monotonic())):
            if key.fileobj is self._fork_server:
                self._hear_fork_server()
            elif isinstance(key.data, Child):
                self._selector.unregister(key.fileobj)
                self._dispatcher.post(self._dispatcher.end_child, key.data)
        self._mailbox.work()
        # One at a time: a hundred starts leave room for a signal between them.
        if time.monotonic() >= at:
            self._alarms.remove((at, call))
            call()

    def _after(self, seconds: float, call: Callable[..., None], *args: Any) -> None:
        self._alarms.append((time.monotonic() + seconds, functools.partial(call, *args)))

    def _tend(self) -> None:
        """Do what is to be done every second."""
        self._after(TITLE_EVERY, self._tend)
        self._show()
        now = time.monotonic()
        for child in self._children:
            if child.stopped_at and now - child.stopped_at > EXIT_GRACE:
                child.kill(Death("it did not exit"))
            elif child.state is State.STARTING and now - child.spawned_at > START_WITHIN:
                child.kill(Death(f"it did not start within {START_WITHIN:.0f} s"))
        self._fork_wanted()
        asked_at = min((at for _, at in self._forking.values()), default=now)
        has_to = FORK_WITHIN
        if not self._fork_server.is_started:
            asked_at, has_to = self._fork_server_since, IMPORT_WITHIN
        if now - asked_at > has_to and self._fork_server.is_open:
            self._replace_fork_server("does not answer")

    def _show(self) -> None:
        """Say in the process title what the workers do."""
        busy = sum(1 for child in self._children if child.assigned)
        silent = len(self._heartbeat.silent)
        more = f", {silent} silent" if silent else ""
        workers = f"{len(self._children)} workers, {busy} busy{more}"
        set_title(f"wakaq-worker: supervisor {self._path} {workers}")

    # -- signals -----------------------------------------------------------------------------------

    def _obey(self, number: int) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGUSR1:
            for child in self._children:
                child.ask_for_stacks()
            self._after(STACKS_AFTER, self._show_stacks)
        elif self._is_draining or number == signal.SIGQUIT:
            logger.warning("%s: stopping at once", name)
            self._drain()
            self._kill_all()
        else:
            logger.info("%s: stopping after the running tasks", name)
            self._drain()
            if self._settings.shutdown_timeout is not None:
                self._after(self._settings.shutdown_timeout, self._kill_all)

    def _show_stacks(self) -> None:
        for child in self._children:
            logger.warning("Stacks of %s:\n%s", child, child.read_stacks())

    def _drain(self) -> None:
        if not self._is_draining:
            self._is_draining = True
            for service in self._bringing:
                service.stop()
            self._dispatcher.post(self._dispatcher.drain)
            self._wanted.clear()
            self._give_up_forking()

    def _kill_all(self) -> None:
        for child in self._children:
            child.kill(Death(SHUTDOWN))

    def _finish(self) -> None:
        """End the threads; the dispatcher's last turn leaves the registry."""
        longest = self._settings.wait_timeout + 1
        # What they are waiting for must not come after the last turn, to where nobody looks.
        for thread in (*self._bringing, *self._dispatcher.wakers):
            thread.join(longest)
        self._dispatcher.post(self._dispatcher.finish, time.monotonic() + SETTLE_GRACE)
        self._dispatcher.join()
        for service in self._guarding:
            service.stop()
        for service in self._guarding:
            service.join(longest)
        groups = self._dispatcher.groups
        if all(group.has_left for group in groups):
            logger.info("Stopped")
        elif any(group.inflight.refused for group in groups):
            logger.error("Redis refuses to settle what was in flight: it is left to rescuers")
        else:
            logger.error("Redis is away: what was in flight is left to rescuers, may run twice")

    # -- starting workers --------------------------------------------------------------------------

    def _spawn(self, slot: int) -> None:
        """Have a worker started, as soon as that is possible."""
        if not self._is_draining:
            self._wanted.append(slot)
            self._fork_wanted()

    def _fork_wanted(self) -> None:
        """Ask for the workers that are wanted, unless that has to wait."""
        while self._wanted and self._can_fork():
            slot = self._wanted.popleft()
            supervisor_id = self._dispatcher.groups[0].inflight.supervisor_id
            try:
                endpoints = self._fork_server.fork(slot, supervisor_id)
            except (
                OSError
            ) as error:  # no descriptors, or a fork server that is gone or reads nothing
                self._try_again(slot, error)
            else:
                self._forking[slot] = endpoints, time.monotonic()

    def _can_fork(self) -> bool:
        if self._memory is not None and self._memory.is_exceeded:
            if not self._is_told and not self._children:
                logger.error("Memory is short, and no worker is left: none is started meanwhile")
            self._is_told = not self._children
            return False
        return self._fork_server.is_started and len(self._forking) < MOST_FORKING

    def _try_again(self, slot: int, error: OSError) -> None:
        logger.error("Worker %d cannot be forked, trying again: %s", slot, error)
        self._after(1.0, self._spawn, slot)

    def _hear_fork_server(self) -> None:
        try:
            for told in self._fork_server.receive():
                match told:
                    case Forked(slot, pid):
                        self._join(slot, pid)
                    case Ended(pid, status):
                        self._note_end(pid, status)
                    case Started():
                        self._failed_fork_servers = 0
                        self._fork_wanted()
                    case Broken(reason):
                        logger.error("The fork server cannot import the application: %s", reason)
        except EOFError:
            self._replace_fork_server("is gone")

    def _note_end(self, pid: int, status: int) -> None:
        for child in (*self._children, *self._reaping):
            if child.pid == pid:
                self._statuses[pid] = status
                if child.end_fd is None:  # nothing else tells, if its channel is held open
                    self._dispatcher.post(self._dispatcher.end_child, child)

    def _join(self, slot: int, pid: int) -> None:
        """Take a worker in that was forked."""
        if slot not in self._forking:  # it was given up, and sees so by the end of its channel
            return
        endpoints, _ = self._forking.pop(slot)
        self._fork_wanted()
        try:
            child = Child(slot, pid, endpoints)
        except OSError as error:  # no descriptors
            endpoints.close()
            self._try_again(slot, error)
            return
        self._children = [*self._children, child]
        if child.end_fd is not None:
            self._selector.register(child.end_fd, selectors.EVENT_READ, child)
        self._dispatcher.post(self._dispatcher.join_child, child)

    def _replace_fork_server(self, why: str) -> None:
        """Give up a fork server; what was asked of it is asked again of another."""
        logger.warning("The fork server %s: starting another", why)
        if not self._fork_server.is_started:
            self._failed_fork_servers += 1
        self._selector.unregister(self._fork_server)
        self._fork_server.close(within=0.0)
        self._wanted.extend(self._give_up_forking())
        if self._failed_fork_servers:
            self._after(backoff(self._failed_fork_servers), self._start_fork_server)
        else:
            self._start_fork_server()

    def _start_fork_server(self) -> None:
        if self._failed_fork_servers >= MOST_FORK_SERVERS and not self._children:
            self._stop_for_good("No fork server can be started, and no worker is left: stopping")
        if self._is_draining:
            return
        try:
            self._fork_server.restart()
        except OSError as error:  # no process, or no descriptors
            logger.error("No fork server can be started: %s", error)  # noqa: TRY400 - no bug
            self._failed_fork_servers += 1
            self._after(1.0, self._start_fork_server)
            return
        self._fork_server_since = time.monotonic()
        self._selector.register(self._fork_server, selectors.EVENT_READ)

    def _give_up_forking(self) -> list[int]:
        """Forget what was asked of the fork server; returns the slots."""
        slots = list(self._forking)
        for endpoints, _ in self._forking.values():
            endpoints.close()
        self._forking = {}
        return slots

    def _stop_for_good(self, why: str) -> None:
        logger.critical(why)
        self._exit_status = BOOT_FAILED
        self._drain()
        self._kill_all()

    # -- the end of workers ------------------------------------------------------------------------

    def _look_after(self, child: Child) -> None:
        """See to a worker that the dispatcher has changed."""
        if child.has_served:
            self._has_booted, self._boot_failures = True, 0
        # Once, although one that dies as soon as it has booted is told of twice.
        if child.state is State.GONE and child in self._children:
            self._reap(child, time.monotonic() + STATUS_GRACE)

    def _reap(self, child: Child, deadline: float) -> None:
        """Say how a worker ended, once the fork server has told, and see to its replacement."""
        if child in self._children:
            self._children = [other for other in self._children if other is not child]
            self._reaping.add(child)
            if child.end_fd is not None:
                with contextlib.suppress(KeyError):  # its end was seen before
                    self._selector.unregister(child.end_fd)
            child.reap()
        status = self._statuses.pop(child.pid, None)
        if status is None and time.monotonic() < deadline and self._fork_server.is_started:
            self._after(0.02, self._reap, child, deadline)
            return
        self._reaping.discard(child)
        if child.boot_failure:
            logger.error("%s cannot start: %s", child, child.boot_failure)
        level = logging.WARNING if status or child.was_running else logging.INFO
        logger.log(level, "%s", describe_end(child, status))
        if not self._is_draining:
            self._replace(child)

    def _replace(self, child: Child) -> None:
        if child.has_served:
            lived = time.monotonic() - child.spawned_at
            self._after(max(0.0, SHORTEST_LIFE - lived), self._spawn, child.slot)
        elif self._has_booted:
            delay = min(2.0**self._boot_failures, LONGEST_DELAY)
            self._boot_failures += 1
            logger.error("Worker %d died while it started, next try in %.0f s", child.slot, delay)
            self._after(delay, self._spawn, child.slot)
        else:
            self._stop_for_good("Workers cannot start, see above: stopping")


def _allow_many_descriptors() -> None:
    """Raise this process's limit to what it may have: each worker takes four descriptors.

    Not the workers' limit: the fork server was forked before.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
