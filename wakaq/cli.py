"""The commands. Not for what they do: each hands over to the part that does it, and says in one line what went wrong."""

import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import click

from wakaq.app import WakaQ
from wakaq.broker import Broker
from wakaq.client import OUTAGES, RedisError
from wakaq.embedded import EmbeddedServer
from wakaq.errors import UnknownQueue, WakaQError
from wakaq.inspector import Inspector
from wakaq.loader import load, suggest
from wakaq.log import configure
from wakaq.message import describe
from wakaq.queue import Queue
from wakaq.scheduler import Scheduler
from wakaq.supervisor.outage import Outage
from wakaq.supervisor.service import Service
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
queue_option = click.option("--queue", "name", required=True, metavar="NAME", help="The queue.")
yes_option = click.option("--yes", is_flag=True, help="Do not ask, as on a terminal it would.")
json_option = click.option("--json", "as_json", is_flag=True, help="Write JSON, for programs.")
all_option = click.option("--all", "is_all", is_flag=True, help="Mean all, as does no INDEX.")
indexes_argument = click.argument("indexes", nargs=-1, metavar="[INDEX]...", type=click.IntRange(0))


@contextlib.contextmanager
def reports_errors() -> Iterator[None]:
    """Tell the user's errors in one line."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "wakaq"
        fail(f"{' '.join(error.format_message().split())} See {command} --help")
    except WakaQError as error:
        fail(str(error))
    except OUTAGES as error:
        remedy = "check the app's url, host, port and password, and that it runs"
        fail(f"Redis cannot be used: {error}; {remedy}")
    except RedisError as error:
        fail(f"Redis refuses: {error}")


def fail(message: str) -> NoReturn:
    """End with one line."""
    click.echo(f"wakaq: {message}", err=True)
    sys.exit(USER_ERROR)


class Command(click.Command):
    """A command that reports errors, those of its command line too."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with reports_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with reports_errors():
            return super().invoke(ctx)


class Group(Command, click.Group):
    """A command with commands."""

    command_class = Command
    group_class = type


@click.group(cls=Group)
@click.version_option(package_name="wakaq")
def main() -> None:
    """WakaQ runs Python functions in the background, on Redis.

    Example: wakaq worker --app=shop.tasks.wakaq
    """


@main.command()
@app_option
@click.option("--embedded", is_flag=True, help="Run Redis too, if none answers on this machine.")
@click.option("--scheduler", "schedules", is_flag=True, help="Run the scheduler as well.")
def worker(path: str, *, embedded: bool, schedules: bool) -> None:
    """Run tasks: supervise as many worker processes as the app's `concurrency` says.

    Example: wakaq-worker --app=shop.tasks.wakaq
    """
    # Here, as is `show` below: each command loads what it needs, and answers sooner.
    from wakaq.supervisor.supervisor import Supervisor  # noqa: PLC0415

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

    # Until the supervisor handles it, so that no server of ours is left behind.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with EmbeddedServer(settings) if embedded else contextlib.nullcontext():
        status = Supervisor(app, path, more_services).run()
    sys.exit(status)


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


@main.command()
@app_option
@json_option
@click.option("--watch", is_flag=True, help="Refresh it every second, until Ctrl-C.")
def info(path: str, *, as_json: bool, watch: bool) -> None:
    """Show how many tasks are in each queue, and what each worker does.

    Example: wakaq-info --app=shop.tasks.wakaq --watch
    """
    from wakaq.info import show  # noqa: PLC0415

    app = load(path)
    show(Inspector(app.settings, app.queues), as_json=as_json, watch=watch)


@main.command()
@app_option
@queue_option
@yes_option
def purge(path: str, name: str, *, yes: bool) -> None:
    """Drop all tasks that wait in a queue, also the delayed ones.

    Example: wakaq-purge --app=shop.tasks.wakaq --queue=emails
    """
    inspector, queue = find(path, name)
    confirm(f"Drop all tasks that wait in queue {name!r}?", yes=yes)
    pending, delayed = inspector.purge(queue)
    click.echo(f"Dropped {pending} pending and {delayed} delayed tasks of queue {name!r}")


@main.group()
def dead() -> None:
    """See, put back or drop dead letters: tasks that WakaQ gave up on.

    Each has an INDEX, 0 for the oldest in its queue. Example:

    wakaq dead retry --app=shop.tasks.wakaq --queue=emails 17
    """


@dead.command("list")
@app_option
@queue_option
@json_option
@click.option("--limit", default=20, type=click.IntRange(1), help="How many; by default 20.")
def dead_list(path: str, name: str, limit: int, *, as_json: bool) -> None:
    """Show the newest dead letters, with reason and traceback.

    Example: wakaq dead list --app=shop.tasks.wakaq --queue=emails
    """
    inspector, queue = find(path, name)
    for index, _, letter in inspector.dead(queue, limit):
        if as_json:
            click.echo(json.dumps({"index": index, **letter.to_dict()}))
        else:
            click.secho(f"{index}  {describe(letter.payload)}", bold=True)
            click.echo(f"{letter.reason}, {letter.at}, {letter.worker}\n{letter.traceback}\n")
    if not as_json:
        click.echo(f"Queue {name!r} has {inspector.count_dead(queue)} dead letters")


@dead.command("retry")
@app_option
@queue_option
@yes_option
@all_option
@indexes_argument
def dead_retry(path: str, name: str, indexes: tuple[int, ...], *, yes: bool, is_all: bool) -> None:
    """Put dead letters back into their queue, as new.

    Example: wakaq dead retry --app=shop.tasks.wakaq --queue=emails --all
    """
    inspector, queue, letters = choose(path, name, indexes, is_all=is_all)
    if not indexes:
        confirm(f"Put back {len(letters)} tasks of queue {name!r}?", yes=yes or is_all)
    count = sum(inspector.revive(queue, letter) for letter in letters)
    click.echo(f"Put {count} of {len(letters)} tasks back into queue {name!r}")


@dead.command("purge")
@app_option
@queue_option
@yes_option
@all_option
@indexes_argument
def dead_purge(path: str, name: str, indexes: tuple[int, ...], *, yes: bool, is_all: bool) -> None:
    """Drop dead letters for good.

    Example: wakaq dead purge --app=shop.tasks.wakaq --queue=emails 17
    """
    inspector, queue, letters = choose(path, name, indexes, is_all=is_all)
    confirm(f"Drop {len(letters)} dead letters of queue {name!r}?", yes=yes)
    click.echo(f"Dropped {inspector.drop(queue, letters)} dead letters of queue {name!r}")


def find(path: str, name: str) -> tuple[Inspector, Queue]:
    """Return the inspector of an app, and its queue of this name."""
    app = load(path)
    known = app.queues_by_name
    if name not in known:
        hint = suggest(name, known)
        raise UnknownQueue(f"--queue={name!r}: the queues are {', '.join(known)}{hint}")
    return Inspector(app.settings, app.queues), known[name]


def choose(
    path: str, name: str, indexes: tuple[int, ...], *, is_all: bool
) -> tuple[Inspector, Queue, list[bytes]]:
    """Find the dead letters of these indexes, all of them if there are none; the oldest first."""
    if indexes and is_all:
        raise click.UsageError("Give either INDEX or --all.", click.get_current_context())
    inspector, queue = find(path, name)
    if indexes:
        return inspector, queue, inspector.find_dead(queue, sorted(set(indexes)))
    letters = [raw for _, raw, _ in inspector.dead(queue, inspector.count_dead(queue))]
    return inspector, queue, letters[::-1]


def confirm(question: str, *, yes: bool) -> None:
    """Ask if there is somebody to ask; end if the answer is no."""
    if not yes and sys.stdin.isatty():
        click.confirm(question, abort=True, err=True)
