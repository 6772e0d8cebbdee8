"""The commands. Not for what they do: each hands over to the part that does it, and says in one line what went wrong."""

import functools
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import click

from wakaq.app import WakaQ
from wakaq.broker import Broker, RedisError
from wakaq.errors import WakaQError
from wakaq.loader import load
from wakaq.log import configure
from wakaq.scheduler import Scheduler
from wakaq.supervisor.outage import Outage
from wakaq.supervisor.service import Service
from wakaq.supervisor.supervisor import Supervisor
from wakaq.titles import set_title

USER_ERROR = 2  # exit status
STOP_GRACE = 1.0  # seconds for the scheduler's last call to Redis, which may be away

app_option = click.option(
    "--app",
    "path",
    required=True,
    metavar="MODULE.VARIABLE",
    help="The application, such as shop.tasks.wakaq.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="wakaq")
def main() -> None:
    """WakaQ runs Python functions in the background, on Redis."""


def reports_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Tell the user's errors in one line."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except WakaQError as error:
            fail(str(error))
        except RedisError as error:
            fail(
                f"Redis cannot be used: {error}; check the app's url, host, port and password, and that it runs"
            )

    return run


def fail(message: str) -> NoReturn:
    """End with one line."""
    click.echo(f"wakaq: {message}", err=True)
    sys.exit(USER_ERROR)


@main.command()
@app_option
@click.option("--scheduler", "schedules", is_flag=True, help="Run the scheduler as well.")
@reports_errors
def worker(path: str, *, schedules: bool) -> None:
    """Run tasks: supervise as many worker processes as the app's `concurrency` says.

    Example: wakaq-worker --app=shop.tasks.wakaq
    """
    app: WakaQ = load(path)
    settings = app.settings
    configure(
        settings.worker_log_level,
        settings.worker_log_file,
        settings.log_format,
        settings.task_log_format,
    )

    def more_services(broker: Broker, outage: Outage) -> list[Service]:
        return [Periodic(Scheduler(app, broker, lambda _: None), outage)] if schedules else []

    sys.exit(Supervisor(app, path, more_services).run())


class Periodic(Service):
    """The thread that enqueues periodic tasks, in a supervisor or alone."""

    name = "scheduler"

    def __init__(self, scheduler: Scheduler, outage: Outage) -> None:
        super().__init__(outage)
        self._scheduler = scheduler

    def tick(self, now: float) -> float | None:
        wait = self._scheduler.tick()
        self._outage.end(now)
        return wait


@main.command()
@app_option
@reports_errors
def scheduler(path: str) -> None:
    """Enqueue periodic tasks; any number may run, each tick is enqueued once.

    Example: wakaq-scheduler --app=shop.tasks.wakaq
    """
    app: WakaQ = load(path)
    settings = app.settings
    configure(
        settings.scheduler_log_level,
        settings.scheduler_log_file,
        settings.log_format,
        settings.task_log_format,
    )
    app.broker.ping()
    service = Periodic(Scheduler(app, app.broker, set_title), Outage())
    # Before the thread starts, so that it blocks them, too: they wait for sigwait.
    signals = {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    service.start()
    signal.sigwait(signals)
    service.stop()
    service.join(STOP_GRACE)
