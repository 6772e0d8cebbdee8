"""What applications write, as type checkers see it.

Only mypy and pyright read this file; nothing runs it.
Each line that has to fail carries an ignore, and both checkers report an ignore that is not needed.
"""

# pyright: reportUnusedFunction=false
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime, timedelta
from typing import Any, assert_type

from wakaq import CronTask, Queue, SoftTimeout, Task, WakaQ

wakaq = WakaQ(
    queues=[(0, "payments"), ("emails", 1), Queue("imports", priority=2, soft_timeout=300), "low"],
    schedules=[CronTask("@daily", "report"), ("0 6 * * *", "report"), ("@hourly", "report", [1])],
    concurrency="cores*2",
    soft_timeout=30,
    hard_timeout=timedelta(minutes=1),
    retry_on=(SoftTimeout, ConnectionError),
    retry_delay=lambda retry: 2.0**retry,
)
WakaQ(queues=["a"], soft_timeout="5")  # type: ignore[arg-type]
WakaQ(queues=["a"], retry_on=5)  # type: ignore[arg-type]
WakaQ(queues=["a"], sof_timeout=5)  # type: ignore[call-arg]
WakaQ()  # type: ignore[call-arg]


@wakaq.task
def report(day: int = 0) -> str:
    return str(day)


@wakaq.task(queue="payments", max_retries=7, soft_timeout=420, retry_delay=timedelta(seconds=3))
def charge(order: int, cents: int, *, currency: str = "EUR") -> bool:
    return bool(order and cents and currency)


@wakaq.task(queue=Queue("emails"), retry_on=ValueError)
async def send(address: str) -> int:
    return len(address)


wakaq.task(queue=5)(report)  # type: ignore[call-overload]
wakaq.task(name="x")  # type: ignore[call-overload]

# A task is called like its function.
a_task: Task[..., str] = report
another: Task[..., int] = report  # type: ignore[assignment]
assert_type(report(), str)
assert_type(charge(1, 100), bool)
assert_type(charge.name, str)
charge("1", 100)  # type: ignore[arg-type]
charge(1)  # type: ignore[call-arg]


async def call_async() -> None:
    assert_type(await send("x"), int)
    assert_type(await send.adelay("x"), None)
    await send.adelay("x", queue="low", eta=timedelta(1))
    await send.using(queue="low").adelay("x")
    await send.adelay(5)  # type: ignore[call-overload]
    await send.using().adelay(5)  # type: ignore[arg-type]


# So it is enqueued,
assert_type(charge.delay(1, 100), None)
charge.delay(1, cents=100, currency="USD")
charge.delay("1", 100)  # type: ignore[call-overload]
charge.delay(1)  # type: ignore[call-overload]
charge.delay(1, 100, 5)  # type: ignore[call-overload]
charge.delay(1, 100, color="red")  # type: ignore[call-overload]

# also with options, whose own types are checked.
charge.delay(1, 100, queue="low")
charge.delay(1, 100, queue=Queue("low"), eta=datetime.now(UTC))
charge.delay(1, 100, eta=timedelta(seconds=10), currency="USD")
report.delay(eta=timedelta(seconds=10))
charge.delay(1, 100, queue=5)  # type: ignore[call-overload]
charge.delay(1, 100, eta=5)  # type: ignore[call-overload]

# With using() the arguments are checked, too.
charge.using(queue="low", eta=timedelta(hours=1)).delay(1, 100)
charge.using(queue="low").delay(1, "100")  # type: ignore[arg-type]
charge.using(queue="low").delay()  # type: ignore[call-arg]
charge.using(eta=5)  # type: ignore[arg-type]

assert_type(charge.broadcast(1, 100), int)
charge.broadcast(1, "100")  # type: ignore[arg-type]
charge.broadcast(1, 100, queue="low")  # type: ignore[call-arg]

with wakaq.batch():
    report.delay(1)


# Hooks and wrappers stay what they are.
@wakaq.before_task_started
def start_timer() -> float:
    return 1.5


@wakaq.after_task_finished
async def stop_timer() -> None: ...


assert_type(start_timer(), float)
a_hook: Callable[[], Coroutine[Any, Any, None]] = stop_timer
wakaq.after_worker_started(lambda: None)
wakaq.after_worker_started(charge.function)  # type: ignore[type-var]


@wakaq.wrap_tasks_with
def in_context(fn: Callable[..., Any]) -> Callable[..., Any]:
    return fn


@wakaq.wrap_tasks_with
async def around(
    fn: Callable[..., Awaitable[None]], args: list[Any], kwargs: dict[str, Any]
) -> None:
    await fn(*args, **kwargs)


assert_type(in_context(len), Callable[..., Any])
CronTask("@daily", charge, args=[1, 100], timezone="Europe/Berlin")
CronTask("@daily", 5)  # type: ignore[arg-type]
CronTask("@daily", "report", args=5)  # type: ignore[arg-type]
