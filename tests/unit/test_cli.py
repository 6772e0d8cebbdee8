"""Command lines that are wrong: one line that says what to do, exit status 2, no traceback."""

import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

from wakaq import cli

SHOP = """
from wakaq import WakaQ
wakaq = WakaQ(queues=["payments", "emails"], port=1)
other = 7
"""
COMMANDS = ["worker", "scheduler", "info", "purge", "dead list", "dead retry", "dead purge"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run `wakaq` in a folder with the package `shop`; returns exit status and stderr."""
    folder = tmp_path / "bazaar"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "tasks.py").write_text(SHOP)
    (folder / "broken.py").write_text("1 / 0\n")
    (folder / "lacking.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("bazaar", "bazaar.tasks"):  # each test has a folder of its own
        monkeypatch.delitem(cli.sys.modules, name, raising=False)

    def run(line: str) -> tuple[int, str]:
        result = CliRunner().invoke(cli.main, line.split(), prog_name="wakaq")
        return result.exit_code, result.stderr

    return run


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("info", r"Missing option '--app'\. See wakaq info --help"),
        ("info --app=bazaar", r"--app='bazaar': write package\.module\.variable"),
        ("info --app=bazar.tasks.wakaq", r"no module named 'bazar' .*; did you mean 'bazaar'\?"),
        ("info --app=bazaar.task.wakaq", r"named 'bazaar.task' .*; did you mean 'tasks'\?"),
        ("info --app=bazaar.tasks.wkq", r"no such variable; did you mean 'wakaq'\?"),
        ("info --app=bazaar.tasks.other", r"it is no WakaQ but a int; did you mean 'wakaq'\?"),
        ("info --app=bazaar.tasks.wakaq.x", r"no module named 'bazaar.tasks.wakaq' in "),
        ("info --app=bazaar.broken.wakaq", r"import fails at .*broken.py:1: ZeroDivisionError"),
        ("info --app=bazaar.lacking.wakaq", r"import fails at .*lacking.py:1: .*nowhere_to_be"),
        ("info --app=bazaar.tasks.wakaq", r"Redis cannot be used: .*refused.*; check the app's"),
        ("purge --app=bazaar.tasks.wakaq", r"Missing option '--queue'"),
        (
            "purge --app=bazaar.tasks.wakaq --queue=emals",
            r"--queue='emals': the queues are payments, emails; did you mean 'emails'\?$",
        ),
        ("dead list --app=bazaar.tasks.wakaq --queue=zzz", r"the queues are payments, emails$"),
        ("dead retry --app=a.b --queue=c x", r"'x' is not a valid integer.*See wakaq dead --help"),
        ("dead retry --app=bazaar.tasks.wakaq --queue=emails", r"Redis cannot be used"),
        ("inf", r"No such command 'inf'"),
        ("worker --embeded", r"No such option '--embeded'.*--embedded"),
        ("dead", r"Missing argument .*retry"),
        ("dead rety --app=a.b --queue=c", r"'rety' is not one of"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(run, line, message):
    status, stderr = run(line)

    assert status == 2
    assert re.search(message, stderr.strip())
    assert stderr.count("\n") == 1
    assert "Traceback" not in stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_and_shows_an_example(command):
    result = CliRunner().invoke(cli.main, [*command.split(), "--help"], terminal_width=80)

    assert result.exit_code == 0
    assert "Example: wakaq" in result.stdout
    assert len(result.stdout.splitlines()) <= 24


def test_wakaq_alone_shows_its_commands():
    result = CliRunner().invoke(cli.main, [])

    assert all(command.split()[0] in result.output for command in COMMANDS)


def test_commands_that_only_look_load_nothing_that_runs_tasks():
    program = "import sys, wakaq.cli, wakaq.info; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", program], text=True).split()

    assert "redis" in loaded
    assert not {"psutil", "multiprocessing", "croniter"} & set(loaded)


def test_a_worker_loads_nothing_that_only_other_commands_need():
    program = "import sys, wakaq.cli, wakaq.supervisor.supervisor; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", program], text=True).split()
    others = {"rich", "wakaq.demo", "wakaq.embedded", "wakaq.info", "wakaq.store.inspect"}

    assert "wakaq.supervisor.dispatcher" in loaded
    assert not others & set(loaded)
