"""The application: registers queues, tasks, schedules and hooks, and enqueues.

Not for running tasks on workers.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar, overload

from wakaq.cron import CronTask
from wakaq.errors import ConfigError, SoftTimeout, UnknownQueue, UnknownTask
from wakaq.hooks import (
    AnyCallable,
    AnyTask,
    arun_between,
    complete,
    run_between,
    takes_call,
    wrap,
)
from wakaq.message import Call, Message, encode_call
from wakaq.queue import Queue, in_order
from wakaq.settings import (
    LOG_FORMAT,
    TASK_LOG_FORMAT,
    Duration,
    Policy,
    RetryDelay,
    RetryOn,
    Settings,
)
from wakaq.store.broker import Broker
from wakaq.task import Args, Kwargs, P, R, Task

AnyHook = Callable[[], object]
Hook = TypeVar("Hook", bound=AnyHook)
Wrapper = TypeVar("Wrapper", bound=AnyCallable)
LogFile = str | os.PathLike[str] | None


class _Batch(list[Call]):
    """The calls of one `batch()` block."""

    is_open = True


class WakaQ:
    """An application's queues, tasks, schedules and hooks.

    The documentation's page on configuration explains each option, with unit and default. Durations
    are seconds or timedeltas. A task's own timeouts and retries win over its queue's, and those
    over these.

    Raises:
        ConfigError: An option is not valid; the message names it, its value and the remedy.
        UnknownQueue: A schedule or `exclude_queues` names a queue that is not there.
    """

    def __init__(  # noqa: PLR0913 - each is an option
        self,
        queues: Sequence[Any],  # Queue, (priority, name) or name; 0 is first, without one last
        schedules: Sequence[Any] = (),  # CronTask or (cron, task[, args[, kwargs]])
        *,
        url: str | None = None,  # redis://, rediss:// or unix://; wins over the five below
        host: str = "localhost",
        port: int = 6379,
        username: str | None = None,
        password: str | None = None,
        db: int = 0,
        prefix: str = "wakaq",  # start of every key
        concurrency: int | str = "cores",  # worker processes: an int or an expression
        async_concurrency: int | str = 0,  # async tasks at once in each; 0: no limit
        exclude_queues: Sequence[str] = (),  # names of queues that these workers do not serve
        soft_timeout: Duration | None = None,  # raises SoftTimeout in the task
        hard_timeout: Duration | None = None,  # kills the worker
        max_retries: int = 0,
        retry_on: RetryOn = SoftTimeout,  # exception type, or a tuple of them
        retry_delay: RetryDelay = 0,  # or a function of the retry's number (1, 2, …)
        max_redeliveries: int = 3,  # how often a task may take its worker down with it
        max_mem_percent: float | None = None,  # 1 to 99; above, the heaviest worker is recycled
        max_tasks_per_worker: int | None = None,  # then it is replaced
        shutdown_timeout: Duration | None = None,  # for running tasks after SIGTERM; None: no end
        dead_letters: int = 10_000,  # how many to keep per queue; 0: none
        worker_log_file: LogFile = None,  # None: stderr; reopened when rotated
        scheduler_log_file: LogFile = None,
        worker_log_level: int | str = "INFO",
        scheduler_log_level: int | str = "DEBUG",
        log_format: str | None = None,  # None: that of wakaq.settings
        task_log_format: str | None = None,  # the same; with task, task_args and so on
        socket_timeout: Duration = 15,
        socket_connect_timeout: Duration = 15,
        health_check_interval: Duration = 30,  # idle connections are checked before use; 0: never
        wait_timeout: Duration = 1,  # longest block on Redis
        synchronous_mode: bool = False,  # .delay() and .broadcast() run in place, with no Redis
    ) -> None:
        self.settings = Settings.create(
            url=url,
            host=host,
            port=port,
            username=username,
            password=password,
            db=db,
            prefix=prefix,
            concurrency=concurrency,
            async_concurrency=async_concurrency,
            exclude_queues=exclude_queues,
            soft_timeout=soft_timeout,
            hard_timeout=hard_timeout,
            max_retries=max_retries,
            retry_on=retry_on,
            retry_delay=retry_delay,
            max_redeliveries=max_redeliveries,
            max_mem_percent=max_mem_percent,
            max_tasks_per_worker=max_tasks_per_worker,
            shutdown_timeout=shutdown_timeout,
            dead_letters=dead_letters,
            worker_log_file=worker_log_file,
            scheduler_log_file=scheduler_log_file,
            worker_log_level=worker_log_level,
            scheduler_log_level=scheduler_log_level,
            log_format=log_format or LOG_FORMAT,
            task_log_format=task_log_format or TASK_LOG_FORMAT,
            socket_timeout=socket_timeout,
            socket_connect_timeout=socket_connect_timeout,
            health_check_interval=health_check_interval,
            wait_timeout=wait_timeout,
            synchronous_mode=synchronous_mode,
        )
        self.queues = in_order(queues)
        self.queues_by_name = {queue.name: queue for queue in self.queues}
        self.default_queue = self.queues[-1]
        self.tasks: dict[str, AnyTask] = {}
        self.schedules = [CronTask.create(schedule) for schedule in schedules]
        self.after_worker_started_hooks: list[AnyHook] = []
        self.before_task_started_hooks: list[AnyHook] = []
        self.after_task_finished_hooks: list[AnyHook] = []
        self._wrapper: AnyCallable | None = None
        self._callables: dict[AnyTask, AnyCallable] = {}
        self._policies: dict[tuple[AnyTask, Queue], Policy] = {}
        self._batch: ContextVar[_Batch | None] = ContextVar("wakaq_batch", default=None)
        for queue in self.queues:
            Policy.resolve(queue, self.settings).check_timeouts(f"queue {queue.name!r}")
        for name in (*self.settings.exclude_queues, *(one.queue for one in self.schedules)):
            self._find_queue(self.default_queue if name is None else name)

    @functools.cached_property
    def broker(self) -> Broker:
        """The way to Redis, made when it is first needed; tests may set another one."""
        return Broker(self.settings, self.queues)

    @overload
    def task(self, function: Callable[P, R], /) -> Task[P, R]: ...
    @overload
    def task(
        self,
        *,
        queue: str | Queue | None = None,
        soft_timeout: Duration | None = None,
        hard_timeout: Duration | None = None,
        max_retries: int | None = None,
        retry_on: RetryOn | None = None,
        retry_delay: RetryDelay | None = None,
    ) -> Callable[[Callable[P, R]], Task[P, R]]: ...
    def task(self, *function: Any, queue: str | Queue | None = None, **limits: Any) -> Any:
        """Register a function as a task, with or without options of its own.

        Raises:
            ConfigError: It cannot be a task, its name is taken, or an option is not valid.
            UnknownQueue: The application has no such queue.
        """
        own_queue = None if queue is None else self._find_queue(queue)

        def register(function: AnyCallable) -> AnyTask:
            task: AnyTask = Task(self, function, own_queue, **limits)
            if other := self.tasks.get(task.name):
                places = f"{other.function.__module__} and {function.__module__}"
                raise ConfigError(f"two tasks are named {task.name!r}, in {places}: rename one")
            self.resolve_queue(own_queue or self.default_queue, task)
            self.tasks[task.name] = task
            return task

        return register(*function) if function else register

    def after_worker_started(self, hook: Hook) -> Hook:
        """Call the hook in each worker process, before its first task."""
        self.after_worker_started_hooks.append(hook)
        return hook

    def before_task_started(self, hook: Hook) -> Hook:
        """Call the hook before each task."""
        self.before_task_started_hooks.append(hook)
        return hook

    def after_task_finished(self, hook: Hook) -> Hook:
        """Call the hook after each task, also one that failed."""
        self.after_task_finished_hooks.append(hook)
        return hook

    def wrap_tasks_with(self, wrapper: Wrapper) -> Wrapper:
        """Run every task through a decorator `wrapper(fn)`, or through `wrapper(fn, args, kwargs)`.

        Raises:
            ConfigError: It is neither, or there is one already.
        """
        takes_call(wrapper)  # raises if it has neither form
        if self._wrapper is not None:
            raise ConfigError(f"wrap_tasks_with: {self._wrapper!r} and {wrapper!r}: join them")
        self._wrapper = wrapper
        self._callables.clear()
        return wrapper

    def validate(self) -> None:
        """Check the schedules, once all tasks are registered.

        Raises:
            UnknownTask: A schedule names a task that is not there.
            ConfigError: Its arguments do not fit the task, or its queue does not.
        """
        for schedule in self.schedules:
            if (task := self.tasks.get(schedule.task_name)) is None:
                known = ", ".join(sorted(self.tasks)) or "none"
                raise UnknownTask(f"{schedule!r} names an unknown task; the known ones: {known}")
            try:
                task.check_arguments(schedule.args, schedule.kwargs)
            except TypeError as error:
                raise ConfigError(f"{schedule!r}: {error}") from error
            self.resolve_queue(schedule.queue, task)

    def resolve_queue(self, queue: str | Queue | None, task: AnyTask) -> Queue:
        """Return the queue of a call: the one given, else the task's own, else the default one.

        Raises:
            UnknownQueue: The application has no such queue.
            ConfigError: The task's timeouts contradict those of the queue given.
        """
        if queue is None:
            return task.queue or self.default_queue
        found = self._find_queue(queue)
        self.policy(task, found).check_timeouts(f"task {task.name!r} on queue {found.name!r}")
        return found

    def _find_queue(self, queue: str | Queue) -> Queue:
        found = self.queues_by_name.get(queue.name if isinstance(queue, Queue) else queue)
        if found is None:
            known = ", ".join(self.queues_by_name)
            raise UnknownQueue(f"unknown queue {queue!r}; the known ones: {known}")
        return found

    def policy(self, task: AnyTask, queue: Queue) -> Policy:
        """Return the timeouts and retries that hold for a task on a queue."""
        if (task, queue) not in self._policies:
            self._policies[task, queue] = Policy.resolve(task, queue, self.settings)
        return self._policies[task, queue]

    def callable_for(self, task: AnyTask) -> AnyCallable:
        """Return what runs a task: its function, in the wrapper if there is one.

        Raises:
            WakaQError: The wrapper is a decorator that returned no function.
        """
        if task not in self._callables:
            self._callables[task] = wrap(task, self._wrapper)
        return self._callables[task]

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Send the calls that this block makes at its end, in few round trips; none if it raises.

        A batch within a batch joins it. Broadcasts are sent at once, since they tell whom they
        reached.
        """
        if (outer := self._batch.get()) is not None and outer.is_open:
            yield
            return
        batch = _Batch()
        token = self._batch.set(batch)
        try:
            yield
        finally:
            # What the block started may outlive it in a copy of its context; its calls are then
            # sent at once.
            batch.is_open = False
            self._batch.reset(token)
        if batch:
            self.broker.enqueue_all(batch)

    def enqueue(self, task: AnyTask, args: Args, kwargs: Kwargs) -> None:
        """Do what `task.delay` promises; `queue` and `eta` are among the kwargs."""
        call = self._accept(task, args, kwargs)
        if call is None:
            return
        if self.settings.synchronous_mode:
            self._run_in_place(task, call.payload)
        elif call.delay is None and call.at is None:
            self.broker.enqueue(call.queue, call.payload)
        else:
            self.broker.enqueue_all([call])

    async def aenqueue(self, task: AnyTask, args: Args, kwargs: Kwargs) -> None:
        """Do what `task.adelay` promises."""
        call = self._accept(task, args, kwargs)
        if call is None:
            return
        if not self.settings.synchronous_mode:
            await self.broker.aenqueue_all([call])
        elif task.is_async:
            await self._arun_in_place(task, call.payload)
        else:
            self._run_in_place(task, call.payload)

    def broadcast(self, task: AnyTask, args: Args, kwargs: Kwargs) -> int:
        """Do what `task.broadcast` promises."""
        task.check_arguments(args, kwargs)  # which know no queue and no eta here
        payload = encode_call(task.json_name, args, kwargs)
        if self.settings.synchronous_mode:
            self._run_in_place(task, payload)
            return 1
        return self.broker.publish(payload)

    def _accept(self, task: AnyTask, args: Args, kwargs: Kwargs) -> Call | None:
        """Check a call, and return it unless it joins a batch."""
        queue, delay, at = task.queue or self.default_queue, None, None
        if kwargs:
            queue = self.resolve_queue(kwargs.pop("queue", None), task)
            delay, at = _due(kwargs.pop("eta", None))
        task.check_arguments(args, kwargs)
        call = Call(queue, encode_call(task.json_name, args, kwargs), delay, at)
        batch = self._batch.get()
        if batch is None or not batch.is_open or self.settings.synchronous_mode:
            return call
        batch.append(call)
        return None

    def _run_in_place(self, task: AnyTask, payload: bytes) -> None:
        """Run a task here and now, between its hooks; raises what it raised."""
        before, after = self.before_task_started_hooks, self.after_task_finished_hooks
        call = self._call_of(task, payload)
        error: BaseException | None
        if task.is_async:
            error = complete(arun_between(before, call, after))
        else:
            error = run_between(before, call, after, complete)
        if error is not None:
            raise error

    async def _arun_in_place(self, task: AnyTask, payload: bytes) -> None:
        """Run an async task on this event loop, between its hooks; raises what it raised."""
        before, after = self.before_task_started_hooks, self.after_task_finished_hooks
        error = await arun_between(before, self._call_of(task, payload), after)
        if error is not None:
            raise error

    def _call_of(self, task: AnyTask, payload: bytes) -> Callable[[], Any]:
        """Return what runs the call of a payload, so that it gets its arguments as on a worker."""
        message = Message.decode(payload)
        return lambda: self.callable_for(task)(*message.args, **message.kwargs)


def _due(eta: object) -> tuple[float | None, float | None]:
    """Return an eta as seconds from now or as unix time; both are None if it is due already.

    Raises:
        TypeError: It is no eta.
    """
    if eta is None:
        return None, None
    if isinstance(eta, timedelta):
        return (eta.total_seconds() if eta > timedelta() else None), None
    if isinstance(eta, datetime):
        return None, (eta if eta.tzinfo else eta.replace(tzinfo=UTC)).timestamp()
    raise TypeError(f"eta={eta!r}: give a datetime (naive: UTC) or timedelta(seconds=…)")
