"""The main thread: starts, reaps and replaces workers, and handles signals. Not for claims: those are the dispatcher's."""

import contextlib
import functools
import logging
import selectors
import signal
import time
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from wakaq.app import WakaQ
from wakaq.broker import Broker
from wakaq.client import RedisError
from wakaq.supervisor.autopsy import SHUTDOWN, describe_end
from wakaq.supervisor.broadcast import Broadcast
from wakaq.supervisor.child import Child, Death
from wakaq.supervisor.dispatcher import Dispatcher
from wakaq.supervisor.heartbeat import Heartbeat
from wakaq.supervisor.lease import Lease
from wakaq.supervisor.memory import Memory, rss
from wakaq.supervisor.promoter import Promoter
from wakaq.supervisor.service import Mailbox, Outage, Service, crash
from wakaq.supervisor.spawner import Spawner
from wakaq.supervisor.timeouts import Timeouts
from wakaq.titles import set_title

logger = logging.getLogger("wakaq.supervisor")

BOOT_FAILED = 3  # exit status: workers die before they are ready
TITLE_EVERY = 1.0  # seconds
EXIT_GRACE = 10.0  # seconds that a worker has to exit after its last task
SETTLE_GRACE = 10.0  # seconds for the last settlements at shutdown, if Redis is away
STACKS_AFTER = 0.3  # seconds in which workers write their stacks
SHORTEST_LIFE = 0.5  # seconds between two starts of one worker
LONGEST_DELAY = 30.0  # seconds between starts of workers that die while they boot


class Supervisor:
    """The parent process that `wakaq-worker` runs; `run` returns the exit status."""

    def __init__(
        self, app: WakaQ, path: str, more_services: Callable[[Broker, Outage], Sequence[Service]]
    ) -> None:
        # Fixed.
        self._settings = settings = app.settings
        self._path = path
        self._spawner = Spawner(path)
        self._broker = app.broker

        # Any thread.
        self._mailbox = Mailbox()

        # Main thread only; the list is replaced, never changed, so that others can read it.
        self._children: list[Child] = []
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._mailbox, selectors.EVENT_READ)
        self._has_booted = False
        self._boot_failures = 0
        self._is_draining = False
        self._alarms: list[tuple[float, Callable[[], None]]] = []  # when to do what
        self._exit_status = 0

        # The threads.
        outage, post = Outage(), self._mailbox.post
        self._lease = Lease(app, outage, self._describe_children)
        self._dispatcher = dispatcher = Dispatcher(
            app, self._broker, outage, self._lease, lambda child: post(self._look_after, child)
        )
        # Those that bring work, and end first; then those that guard it, and end last.
        self._bringing: list[Service] = [
            Promoter(self._broker, outage),
            Broadcast(self._broker, lambda one: dispatcher.post(dispatcher.relay, one), outage),
            *more_services(self._broker, outage),
        ]
        children = self._read_children
        self._heartbeat = Heartbeat(
            children, lambda child: dispatcher.post(dispatcher.flush_later, child), outage
        )
        self._guarding: list[Service] = [self._lease, self._heartbeat, Timeouts(children, outage)]
        self._memory: Memory | None = None
        if (limit := settings.max_mem_percent) is not None:
            self._memory = Memory(
                children, lambda one: dispatcher.post(dispatcher.retire_child, one), limit, outage
            )
            self._guarding.append(self._memory)

    # -- what the children do (any thread) ---------------------------------------------------------

    def _read_children(self) -> list[Child]:
        return self._children

    def _describe_children(self) -> list[dict[str, Any]]:
        """Return what workers do, as the registry holds it (lease thread)."""
        now, entries = time.monotonic(), []
        for child in self._children:
            child.rss = rss(child)
            tasks = [
                {"name": call, "seconds": round(now - at, 1)} for _, at, call in child.running()
            ]
            entry = {"number": child.number, "pid": child.pid, "rss": child.rss, "tasks": tasks}
            entries.append(entry | {"is_silent": child in self._heartbeat.silent})
        return entries

    # -- life --------------------------------------------------------------------------------------

    def run(self) -> int:
        """Supervise until a signal, or a failure that cannot heal.

        Raises:
            redis.RedisError: Redis cannot be reached at the start.
        """
        if policy := self._broker.risk_of_eviction():
            logger.warning("Redis may drop tasks: maxmemory-policy is %s, set noeviction", policy)
        self._lease.rescue_neighbours()
        self._dispatcher.claimer.ledger.rename(self._lease.register())
        for one in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1):
            signal.signal(one, lambda received, _: self._mailbox.post(self._obey, received))
        try:
            self._dispatcher.start()
            for service in (*self._guarding, *self._bringing):
                service.start()
            logger.info("Started with %d workers for %s", self._settings.concurrency, self._path)
            self._tend()
            for number in range(1, self._settings.concurrency + 1):
                self._in(0.0, self._spawn, number)
            while not (self._is_draining and not self._children):
                self._step()
            self._finish()
        except BaseException:  # noqa: BLE001 - whatever it is
            crash("The supervisor")
        return self._exit_status

    def _step(self) -> None:
        at, ring = min(self._alarms, key=itemgetter(0))
        for key, _ in self._selector.select(max(0.0, at - time.monotonic())):
            if key.data is not None:
                self._selector.unregister(key.fileobj)
                self._dispatcher.post(self._dispatcher.end_child, key.data)
        self._mailbox.work()
        # One at a time: a hundred starts leave room for a signal between them.
        if time.monotonic() >= at:
            self._alarms.remove((at, ring))
            ring()

    def _in(self, seconds: float, ring: Callable[..., None], *args: Any) -> None:
        self._alarms.append((time.monotonic() + seconds, functools.partial(ring, *args)))

    def _tend(self) -> None:
        """Do what is to be done every second."""
        self._in(TITLE_EVERY, self._tend)
        busy = sum(1 for child in self._children if child.assigned)
        hushed = len(self._heartbeat.silent)
        silent = f", {hushed} silent" if hushed else ""
        workers = f"{len(self._children)} workers, {busy} busy{silent}"
        set_title(f"wakaq-worker: supervisor {self._path} {workers}")
        if not self._is_draining:
            self._spawner.tend()
        for child in self._children:
            if child.stopped_at and time.monotonic() - child.stopped_at > EXIT_GRACE:
                child.kill(Death("it did not exit"))

    # -- signals -----------------------------------------------------------------------------------

    def _obey(self, number: int) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGUSR1:
            for child in self._children:
                if child.is_ready:  # before, the signal would kill it
                    child.ask_for_stacks()
            self._in(STACKS_AFTER, self._show_stacks)
        elif self._is_draining or number == signal.SIGQUIT:
            logger.warning("%s: stopping at once", name)
            self._drain()
            self._kill_all()
        else:
            logger.info("%s: stopping after the running tasks", name)
            self._drain()
            if self._settings.shutdown_timeout is not None:
                self._in(self._settings.shutdown_timeout, self._kill_all)

    def _show_stacks(self) -> None:
        for child in self._children:
            logger.warning("Stacks of %s:\n%s", child, child.read_stacks())

    def _drain(self) -> None:
        if not self._is_draining:
            self._is_draining = True
            for service in self._bringing:
                service.stop()
            self._dispatcher.post(self._dispatcher.drain)

    def _kill_all(self) -> None:
        for child in self._children:
            child.kill(Death(SHUTDOWN))

    def _finish(self) -> None:
        """End the threads, then leave the registry, unless something was left in flight that others have to rescue."""
        patience, claimer = self._settings.wait_timeout + 1, self._dispatcher.claimer
        for service in self._bringing:
            service.join(patience)
        self._dispatcher.post(self._dispatcher.finish, time.monotonic() + SETTLE_GRACE)
        self._dispatcher.join()
        for service in self._guarding:
            service.stop()
        for service in self._guarding:
            service.join(patience)
        if not claimer.ledger.is_settled:
            logger.error("Redis is away: what was in flight is left to rescuers, may run twice")
            return
        try:
            self._lease.leave(is_haunted=claimer.is_haunted())
        except RedisError as error:  # it is away, or refuses
            logger.warning("Others will have to forget this supervisor: %s", error)
        logger.info("Stopped")

    # -- workers -----------------------------------------------------------------------------------

    def _spawn(self, number: int) -> None:
        if self._is_draining:
            return
        if self._memory is not None and self._memory.is_exceeded:
            self._in(1.0, self._spawn, number)
            return
        try:
            child = self._spawner.spawn(number, self._lease.worker_id)
        # No memory, no descriptors, or a fork server that has just died.
        except (OSError, EOFError) as error:
            logger.error("Worker %d cannot be forked, trying again: %s", number, error)  # noqa: TRY400 - no bug
            self._in(1.0, self._spawn, number)
            return
        self._children = [*self._children, child]
        self._selector.register(child.end_fd, selectors.EVENT_READ, child)
        self._dispatcher.post(self._dispatcher.join_child, child)

    def _look_after(self, child: Child) -> None:
        """See to a worker that the dispatcher has changed."""
        if child not in self._children:  # it was told of before, and buried then
            return
        if child.is_ready:
            self._has_booted, self._boot_failures = True, 0
        if child.is_gone:
            self._bury(child)
        elif child.needs_successor and not child.has_successor:
            child.has_successor = True
            self._in(0.0, self._spawn, child.number)

    def _bury(self, child: Child) -> None:
        """Reap a worker, and see to its replacement."""
        self._children = [other for other in self._children if other is not child]
        with contextlib.suppress(KeyError):  # its end was seen before
            self._selector.unregister(child.end_fd)
        status = child.reap()
        if child.boot_failure:
            logger.error("%s cannot start: %s", child, child.boot_failure)
        level = logging.WARNING if status or child.victims else logging.INFO
        logger.log(level, "%s", describe_end(child, status))
        if self._is_draining or child.has_successor:
            return
        if child.is_ready:
            lived = time.monotonic() - child.spawned_at
            self._in(max(0.0, SHORTEST_LIFE - lived), self._spawn, child.number)
        elif self._has_booted:
            delay = min(2.0**self._boot_failures, LONGEST_DELAY)
            self._boot_failures += 1
            logger.error("Worker %d died while it started, next try in %.0f s", child.number, delay)
            self._in(delay, self._spawn, child.number)
        else:
            logger.critical("Workers cannot start, see above: stopping")
            self._exit_status = BOOT_FAILED
            self._drain()
            self._kill_all()
