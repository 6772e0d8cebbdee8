"""The main thread: starts, reaps and replaces workers, and handles signals. Not for claims: those are the dispatcher's."""

import contextlib
import logging
import os
import selectors
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

from wakaq.app import WakaQ
from wakaq.broker import Broker
from wakaq.client import OUTAGES
from wakaq.supervisor import reports
from wakaq.supervisor.autopsy import SHUTDOWN
from wakaq.supervisor.broadcast import Broadcast
from wakaq.supervisor.child import Child, Death
from wakaq.supervisor.dispatcher import Dispatcher
from wakaq.supervisor.events import (
    Booted,
    BootFailed,
    Crashed,
    Drain,
    Ended,
    Finish,
    Gone,
    Inbox,
    Joined,
    Retiring,
)
from wakaq.supervisor.heartbeat import Heartbeat
from wakaq.supervisor.lease import Lease
from wakaq.supervisor.memory import Memory
from wakaq.supervisor.outage import Outage
from wakaq.supervisor.promoter import Promoter
from wakaq.supervisor.service import Service
from wakaq.supervisor.spawner import Spawner
from wakaq.supervisor.timeouts import Timeouts, read_stacks
from wakaq.titles import set_title

logger = logging.getLogger("wakaq.supervisor")

BOOT_FAILED = 3  # exit status: workers die before they are ready
CRASHED = 4  # exit status: a bug of ours
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
        self._app = app
        self._path = path
        self._spawner = Spawner(path)
        self._broker = Broker(app.settings, app.queues)
        outage = Outage()

        # Any thread.
        self._inbox = Inbox()

        # Main thread only; the list is replaced, never changed, so that others can read it.
        self._children: list[Child] = []
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._inbox, selectors.EVENT_READ)
        self._vacancies: list[tuple[float, int]] = []  # when to start a worker of which number
        self._has_booted = False
        self._boot_failures = 0
        self._is_draining = False
        self._kill_at: float | None = None
        self._stacks_at: float | None = None
        self._titled_at = 0.0
        self._exit_status = 0

        # The threads.
        self._lease = Lease(app, outage, self._describe)
        self._dispatcher = Dispatcher(app, self._broker, outage, self._lease, self._inbox.post)
        # Those that bring work, and end first; then those that guard it, and end last.
        self._bringing: list[Service] = [
            Promoter(self._broker, outage),
            Broadcast(self._broker, self._dispatcher, outage),
            *more_services(self._broker, outage),
        ]
        self._heartbeat = Heartbeat(self._read_children, self._dispatcher.post, outage)
        timeouts = Timeouts(self._read_children, outage)
        self._guarding: list[Service] = [self._lease, self._heartbeat, timeouts]
        self._memory: Memory | None = None
        if app.settings.max_mem_percent is not None:
            self._memory = Memory(
                self._read_children, self._dispatcher.post, app.settings.max_mem_percent, outage
            )
            self._guarding.append(self._memory)

    def _read_children(self) -> list[Child]:
        return self._children

    def _describe(self) -> list[dict[str, Any]]:
        return reports.describe(self._children, self._heartbeat.silent)

    # -- life --------------------------------------------------------------------------------------

    def run(self) -> int:
        """Supervise until a signal, or a failure that cannot heal.

        Raises:
            redis.RedisError: Redis cannot be reached at the start.
        """
        if policy := self._broker.risk_of_eviction():
            logger.warning(
                "Redis may throw tasks away: set its maxmemory-policy to noeviction, it is %s",
                policy,
            )
        self._lease.rescue_neighbours()
        self._dispatcher.ledger.rename(self._lease.register())
        self._install_signals()
        self._dispatcher.start()
        for number in range(1, self._app.settings.concurrency + 1):
            self._vacancies.append((0.0, number))
        for service in (*self._guarding, *self._bringing):
            service.start()
        logger.info("Started with %d workers for %s", self._app.settings.concurrency, self._path)
        while not (self._is_draining and not self._children):
            self._step()
        self._finish()
        return self._exit_status

    def _step(self) -> None:
        now = time.monotonic()
        self._fill_vacancies(now)
        moments = [self._titled_at + TITLE_EVERY]
        moments += [due for due, _ in self._vacancies[:1]]
        moments += [at for at in (self._kill_at, self._stacks_at) if at is not None]
        for key, _ in self._selector.select(max(0.0, min(moments) - time.monotonic())):
            if key.data is not None:
                self._selector.unregister(key.fileobj)
                self._dispatcher.post(Ended(key.data))
        for event in self._inbox.take():
            self._handle(event)
        self._keep_time(time.monotonic())

    def _handle(self, event: Any) -> None:
        match event:
            case signal.Signals():
                self._obey(event)
            case Booted():
                self._has_booted, self._boot_failures = True, 0
            case BootFailed(child, reason):
                logger.error("Worker %d (pid %d) cannot start: %s", child.number, child.pid, reason)
            case Retiring(child):
                if not self._is_draining:
                    child.has_replacement = True
                    self._vacancies.append((0.0, child.number))
            case Gone(child, victims):
                self._bury(child, victims)
            case Crashed(error):
                self._crash(error)
            case _:
                raise AssertionError(event)

    def _keep_time(self, now: float) -> None:
        if now - self._titled_at >= TITLE_EVERY:
            self._titled_at = now
            busy = sum(1 for child in self._children if child.assigned)
            hushed = len(self._heartbeat.silent)
            silent = f", {hushed} silent" if hushed else ""
            workers = f"{len(self._children)} workers, {busy} busy{silent}"
            set_title(f"wakaq-worker: supervisor {self._path} {workers}")
            if not self._is_draining:
                self._spawner.tend()
            for child in self._children:
                if child.stopped_at is not None and now - child.stopped_at > EXIT_GRACE:
                    child.kill(Death("it did not exit"))
        if self._kill_at is not None and now >= self._kill_at:
            self._kill_at = None
            self._kill_all()
        if self._stacks_at is not None and now >= self._stacks_at:
            self._stacks_at = None
            for child in self._children:
                logger.warning(
                    "Stacks of worker %d (pid %d):\n%s", child.number, child.pid, read_stacks(child)
                )

    # -- signals -----------------------------------------------------------------------------------

    def _install_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1):
            signal.signal(number, lambda received, _: self._inbox.post(signal.Signals(received)))

    def _obey(self, number: signal.Signals) -> None:
        if number == signal.SIGUSR1:
            for child in self._children:
                os.ftruncate(child.stacks_fd, 0)
                child.signal(signal.SIGUSR1)
            self._stacks_at = time.monotonic() + STACKS_AFTER
        elif self._is_draining or number == signal.SIGQUIT:
            logger.warning("%s: stopping at once", number.name)
            self._drain()
            self._kill_all()
        else:
            logger.info("%s: stopping after the running tasks", number.name)
            self._drain()
            if self._app.settings.shutdown_timeout is not None:
                self._kill_at = time.monotonic() + self._app.settings.shutdown_timeout

    def _drain(self) -> None:
        if self._is_draining:
            return
        self._is_draining = True
        self._vacancies.clear()
        for service in self._bringing:
            service.stop()
        self._dispatcher.post(Drain())

    def _kill_all(self) -> None:
        for child in self._children:
            child.kill(Death(SHUTDOWN))

    def _crash(self, error: BaseException) -> None:
        """End at once: without its dispatcher a supervisor is no use, and its workers take care of themselves."""
        logger.critical("The dispatcher failed: this is a bug in WakaQ", exc_info=error)
        logging.shutdown()
        os._exit(CRASHED)

    def _finish(self) -> None:
        """End the threads, then leave the registry, unless something was left in flight that others have to rescue."""
        patience = self._app.settings.wait_timeout + 1
        for service in self._bringing:
            service.join(patience)
        self._dispatcher.post(Finish(time.monotonic() + SETTLE_GRACE))
        self._dispatcher.join()
        for service in self._guarding:
            service.stop()
        for service in self._guarding:
            service.join(patience)
        if not self._dispatcher.ledger.is_settled:
            logger.error(
                "Redis is away: what was in flight is left to be rescued, and may run twice"
            )
            return
        try:
            self._lease.leave(is_haunted=self._dispatcher.is_haunted())
        except OUTAGES as error:
            logger.warning(
                "Redis is away, others will remove this supervisor from the registry: %s", error
            )
        logger.info("Stopped")

    # -- workers -----------------------------------------------------------------------------------

    def _fill_vacancies(self, now: float) -> None:
        if self._memory is not None and self._memory.is_exceeded:
            return
        self._vacancies.sort()
        while self._vacancies and self._vacancies[0][0] <= now and self._inbox.is_empty():
            _, number = self._vacancies.pop(0)
            try:
                self._spawn(number)
            # No memory, no descriptors, or a fork server that has just died.
            except (OSError, EOFError) as error:
                logger.error("Worker %d cannot be forked, trying again: %s", number, error)  # noqa: TRY400 - no bug
                self._vacancies.append((now + 1.0, number))
                return

    def _spawn(self, number: int) -> None:
        child = self._spawner.spawn(number, self._lease.worker_id)
        self._children = [*self._children, child]
        self._selector.register(child.end_fd, selectors.EVENT_READ, child)
        self._dispatcher.post(Joined(child))

    def _bury(self, child: Child, victims: list[str]) -> None:
        """Reap a worker, and see to its replacement."""
        self._children = [other for other in self._children if other is not child]
        with contextlib.suppress(KeyError):  # its end was seen before
            self._selector.unregister(child.end_fd)
        status = child.reap()
        reports.report_death(child, status, victims)
        if self._is_draining or child.has_replacement:
            return
        now = time.monotonic()
        if child.is_ready:
            self._vacancies.append((max(now, child.spawned_at + SHORTEST_LIFE), child.number))
        elif self._has_booted:
            delay = min(2.0**self._boot_failures, LONGEST_DELAY)
            self._boot_failures += 1
            logger.error("Worker %d died while it started, next try in %.0f s", child.number, delay)
            self._vacancies.append((now + delay, child.number))
        else:
            logger.critical("Workers cannot start, see above: stopping")
            self._exit_status = BOOT_FAILED
            self._drain()
            self._kill_all()
