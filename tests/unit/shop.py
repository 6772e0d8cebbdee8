# ruff: noqa: FBT001, FBT002 - as a user would write it
"""The application of the documentation, as it stands there."""

import inspect
from datetime import timedelta

from wakaq import CronTask, Queue, SoftTimeout, WakaQ

HIGH, MEDIUM, LOW = "payments", "emails", "reports"

wakaq = WakaQ(
    # A queue is a Queue, a (priority, name) or (name, priority) pair, or a name. Smaller numbers
    # are served first. A queue without a priority comes after all others; the last one is the
    # default queue.
    queues=[
        (0, HIGH),
        ("emails", 1),
        Queue("imports", priority=2, max_retries=5, soft_timeout=300, hard_timeout=360),
        LOW,
    ],
    concurrency="cores*2",  # worker processes
    async_concurrency=100,  # async tasks at once in each of them; 0: no limit
    soft_timeout=30,  # seconds or timedelta; raises SoftTimeout in the task
    hard_timeout=timedelta(minutes=1),  # SIGKILL
    max_retries=3,  # after a soft timeout
    max_mem_percent=90,  # recycle the heaviest worker
    max_tasks_per_worker=5000,  # recycle every worker now and then
    schedules=[
        CronTask(
            "*/5 * * * *", "send_reminders", queue=MEDIUM, args=[7], kwargs={"dry_run": False}
        ),
        ("0 6 * * *", "daily_report"),  # task's own queue, else the default one
        ("*/10 * * * *", "send_reminders", [1], {}),  # also (schedule, name, args)
    ],
)


@wakaq.task
def daily_report(): ...


@wakaq.task(queue=HIGH, max_retries=7, soft_timeout=420, hard_timeout=480)
def charge(order_id: int, cents: int): ...


@wakaq.task(
    queue=MEDIUM, retry_on=(SoftTimeout, ConnectionError), retry_delay=timedelta(seconds=30)
)
async def send_reminders(days: int, dry_run: bool = True): ...


@wakaq.wrap_tasks_with
def in_app_context(fn):
    async def run_async(*args, **kwargs):
        # before each async task
        await fn(*args, **kwargs)
        # after it

    def run(*args, **kwargs):
        # before each other task
        fn(*args, **kwargs)
        # after it

    return run_async if inspect.iscoroutinefunction(fn) else run


@wakaq.after_worker_started  # in each worker process
def connect(): ...


@wakaq.before_task_started
def start_timer(): ...


@wakaq.after_task_finished  # also after a failure
def stop_timer(): ...


if __name__ == "__main__":
    charge(1, 100)  # an ordinary call, here and now
    charge.delay(1, 100)  # on a worker somewhere
    charge.delay(1, 100, queue=LOW)  # on another queue
    daily_report.delay(eta=timedelta(seconds=10))  # not before then; also a datetime (naive: UTC)
    charge.using(queue=LOW, eta=timedelta(hours=1)).delay(
        1, 100
    )  # the same, with the arguments type-checked
    reached = daily_report.broadcast()  # once on every running wakaq-worker; how many that was
    with wakaq.batch():  # many calls, few round trips; nothing is sent if the block raises
        for order in range(10_000):
            charge.delay(order, 100)
