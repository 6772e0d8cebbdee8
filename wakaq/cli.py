"""The commands: each hands over to the part that does it, and says in one line what went wrong.

A command imports what it needs when it runs. So it answers sooner, and a worker, whose memory holds
what was imported here, does without the tables, the demo and the embedded server.
"""
# ruff: noqa: PLC0415 - see above

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterable
from typing import Any

import click

from wakaq.app import WakaQ
from wakaq.errors import UnknownQueue, WakaQError
from wakaq.loader import load, suggest
from wakaq.log import configure, start_queue
from wakaq.message import describe
from wakaq.queue import Queue
from wakaq.store.connection import RedisError, ResponseError, is_outage
from wakaq.store.dead_letter import DeadLetter

STOP_GRACE = 1.0  # seconds for the scheduler's last call to Redis, which may be away
USAGE_ERROR = 2  # exit status: something is wrong that the user can put right

app_option = click.option("--app", "path", required=True, help="Such as shop.tasks.wakaq.")
queue_option = click.option("--queue", "name", required=True, help="The queue's name.")
yes_option = click.option("--yes", is_flag=True, help="Do not ask, as on a terminal it would.")
json_option = click.option("--json", "as_json", is_flag=True, help="Write JSON, for programs.")


class Command(click.Command):
    """A command that tells the user's errors in one line, those of its command line too."""

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            sys.exit(super().main(*args, **options | {"standalone_mode": False}))
        except click.Abort:
            sys.exit(1)
        except click.exceptions.NoArgsIsHelpError as error:
            message = error.format_message()
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "wakaq"
            message = f"wakaq: {' '.join(error.format_message().split())} See {command} --help"
        except WakaQError as error:
            message = f"wakaq: {error}"
        except RedisError as error:
            message = f"wakaq: {explain(error)}"
        click.echo(message, err=True)
        sys.exit(USAGE_ERROR)


class Group(Command, click.Group):
    """A command with commands."""

    command_class = Command


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
def worker(path: str, *, embedded: bool, schedules: bool) -> int:
    """Run tasks: supervise as many worker processes as the app's `concurrency` says.

    Example: wakaq-worker --app=shop.tasks.wakaq
    """
    from wakaq.supervisor.supervisor import Supervisor

    app = load(path)
    options = app.settings
    level, file = options.worker_log_level, options.worker_log_file
    configure(level, file, options.log_format, options.task_log_format)
    # It forks its fork server now, before there is a thread or a server of ours to be copied.
    with contextlib.ExitStack() as stack:
        supervisor = Supervisor(app, path, with_scheduler=schedules)
        stack.callback(supervisor.close)
        # Until the supervisor handles it, so that what was started is ended.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        if embedded:
            from wakaq.embedded import EmbeddedServer

            stack.enter_context(EmbeddedServer(options))
        stop_queue = start_queue()
        try:
            status = supervisor.run()
        finally:
            is_log_written = stop_queue()
    if not is_log_written:
        os._exit(status)
    return status


@main.command()
@app_option
def scheduler(path: str) -> None:
    """Enqueue periodic tasks; any number may run, each tick is enqueued once.

    Example: wakaq-scheduler --app=shop.tasks.wakaq
    """
    from wakaq.scheduler import Scheduler
    from wakaq.service import Outage
    from wakaq.titles import set_title

    app = load(path)
    options = app.settings
    level, file = options.scheduler_log_level, options.scheduler_log_file
    configure(level, file, options.log_format, options.task_log_format)
    app.broker.ping()
    service = Scheduler(app, app.broker, set_title, Outage())
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
    from wakaq.info import show
    from wakaq.store.inspect import Inspector

    show(Inspector(load(path).broker), as_json=as_json, watch=watch)


@main.command()
@app_option
@queue_option
@yes_option
def purge(path: str, name: str, *, yes: bool) -> None:
    """Drop all tasks that wait in a queue, also the delayed ones.

    Example: wakaq-purge --app=shop.tasks.wakaq --queue=emails
    """
    from wakaq.store.inspect import Inspector

    app, queue = load_queue(path, name)
    confirm(f"Drop all tasks that wait in queue {name!r}?", yes=yes)
    pending, delayed = Inspector(app.broker).purge(queue)
    click.echo(f"Dropped {pending} pending and {delayed} delayed tasks of queue {name!r}")


@main.command()
@click.argument("action", type=click.Choice(["list", "retry", "purge"]))
@click.argument("indexes", nargs=-1, metavar="[INDEX]...", type=click.IntRange(0))
@app_option
@queue_option
@yes_option
@json_option
@click.option("--limit", default=20, type=click.IntRange(1), help="How many to list, else 20.")
def dead(  # noqa: PLR0913 - each is an option
    action: str,
    indexes: tuple[int, ...],
    path: str,
    name: str,
    *,
    yes: bool,
    as_json: bool,
    limit: int,
) -> None:
    """See, put back or drop dead letters: tasks that WakaQ gave up on.

    Each has an INDEX, 0 for the oldest in its queue. Without one, the newest are listed, and all
    are put back or dropped.

    Example: wakaq dead retry --app=shop.tasks.wakaq --queue=emails 17
    """
    from wakaq.store.inspect import Inspector

    app, queue = load_queue(path, name)
    inspector = Inspector(app.broker)
    count = inspector.count_dead_letters(queue)
    if action == "list":
        newest_first = range(count - 1, max(count - limit, 0) - 1, -1)
        chosen = indexes or newest_first
        numbered = zip(chosen, inspector.dead_letters(queue, chosen), strict=True)
        show_dead_letters(numbered, as_json=as_json)
        if not as_json:
            click.echo(f"Queue {name!r} has {count} dead letters")
        return
    letters = inspector.dead_letters(queue, sorted(set(indexes)) or range(count))
    if action == "purge":
        confirm(f"Drop {len(letters)} dead letters of queue {name!r}?", yes=yes)
        dropped = inspector.purge_dead_letters(queue, letters)
        click.echo(f"Dropped {dropped} dead letters of queue {name!r}")
    else:
        confirm(f"Put {len(letters)} tasks back?", yes=yes or bool(indexes))
        retried = sum(inspector.retry_dead_letter(queue, letter) for letter in letters)
        click.echo(f"Put {retried} of {len(letters)} tasks back into queue {name!r}")


@main.command()
def demo() -> int:
    """See the whole at work for some seconds, on a private server; needs wakaq[embedded].

    Example: wakaq demo
    """
    from wakaq.demo import run_demo

    return run_demo()


def load_queue(path: str, name: str) -> tuple[WakaQ, Queue]:
    """Return an app, and its queue of this name.

    Raises:
        ConfigError: There is no such app.
        UnknownQueue: It has no such queue.
    """
    app = load(path)
    if name not in app.queues_by_name:
        known = ", ".join(app.queues_by_name)
        hint = suggest(name, app.queues_by_name)
        raise UnknownQueue(f"--queue={name!r}: the queues are {known}{hint}")
    return app, app.queues_by_name[name]


def show_dead_letters(numbered: Iterable[tuple[int, bytes]], *, as_json: bool) -> None:
    """Write dead letters, with their indexes, to stdout."""
    for index, raw in numbered:
        letter = DeadLetter.decode(raw)
        if as_json:
            click.echo(json.dumps({"index": index, **letter.to_dict()}))
        else:
            click.echo(f"{index}  {describe(letter.payload)}")
            click.echo(f"{letter.reason}, {letter.at}, {letter.worker}\n{letter.traceback}\n")


def confirm(question: str, *, yes: bool) -> None:
    """Ask if there is somebody to ask; end if the answer is no."""
    if not yes and sys.stdin.isatty():
        click.confirm(question, abort=True, err=True)


def explain(error: RedisError) -> str:
    """Return what is wrong with Redis, and what to do."""
    if isinstance(error, ResponseError) and not is_outage(error):
        return f"Redis refuses: {error}"
    remedy = "check the app's url, host, port and password, and that it runs"
    return f"Redis cannot be used: {error}; {remedy}"
