"""The commands. Not for what they do: each hands over to the part that does it, and says in one line what went wrong."""

import functools
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import click

from wakaq.app import WakaQ
from wakaq.broker import RedisError
from wakaq.errors import WakaQError
from wakaq.loader import load
from wakaq.log import configure
from wakaq.supervisor.supervisor import Supervisor

USER_ERROR = 2  # exit status

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
@reports_errors
def worker(path: str) -> None:
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
    sys.exit(Supervisor(app, path, lambda *_: []).run())
