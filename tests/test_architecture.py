"""What the package promises about itself: who may import what, which way a task goes, and more."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import wakaq

REPOSITORY = Path(__file__).parent.parent
PACKAGE = Path(wakaq.__file__).parent
PYTHON = sorted(PACKAGE.rglob("*.py"))
FILES = sorted([*PYTHON, *PACKAGE.rglob("*.lua")])
MOST_COLUMNS = 100
PRAGMA = re.compile(r"  # (noqa|type: ignore|pragma|fmt:).*")  # which cannot be broken
LUA_DEFINITION = re.compile(r"^local function (\w+)", re.MULTILINE)
DOORS = {
    "redis": "store/connection.py",
    "croniter": "cron.py",
    "psutil": "supervisor/memory.py",
    "setproctitle": "titles.py",
    "click": "cli.py",
}

# The reading paths: what one reads, in this order, to follow what happens. Each is told by the
# section of `docs/how-it-works.md` of this title. It names the same files, spelled as here, in the
# same order (a file that comes again need not be named again), and no other file of the package.
PATHS = {
    "A task's way": [
        "task.py:Task.delay",
        "app.py:WakaQ.enqueue",
        "message.py:encode_call",
        "store/broker.py:Broker.enqueue",
        "supervisor/waker.py:Waker.tick",
        "supervisor/dispatcher.py:Dispatcher._plan_turn",
        "supervisor/prefetch.py:sync_room",
        "store/turns.py:InFlight.turn",
        "supervisor/sender.py:Sender.run",
        "store/lua/turn.lua:claim_from",
        "supervisor/dispatcher.py:Dispatcher._hand_out",
        "supervisor/child.py:Child.assign",
        "channel.py:Assign",
        "worker/control.py:Control._listen",
        "worker/assignments.py:Assignments.add",
        "worker/sync_runner.py:SyncRunner._process",
        "worker/assignments.py:Assignments.flush",
        "channel.py:Done",
        "supervisor/dispatcher.py:Dispatcher._acknowledge",
        "store/turns.py:InFlight.acknowledge",
        "store/lua/turn.lua:acknowledge",
    ],
    "A worker is killed": [
        "progress.py:Progress.begin",
        "supervisor/timeouts.py:overdue",
        "supervisor/timeouts.py:Timeouts._kill",
        "supervisor/child.py:Child.kill",
        "supervisor/supervisor.py:Supervisor._step",
        "supervisor/dispatcher.py:Dispatcher.end_child",
        "supervisor/dispatcher.py:Dispatcher._attend",
        "supervisor/dispatcher.py:Dispatcher._lose",
        "supervisor/worker_exit.py:settlements",
        "worker/outcome.py:hard_timeout",
        "store/turns.py:InFlight.turn",
        "store/lua/turn.lua:move",
        "supervisor/supervisor.py:Supervisor._reap",
        "supervisor/fork_server.py:ForkServer.fork",
    ],
    "A soft timeout": [
        "worker/sync_runner.py:SyncRunner._process",
        "progress.py:Progress.begin",
        "supervisor/timeouts.py:Timeouts.tick",
        "supervisor/child.py:Child.signal",
        "worker/sync_runner.py:SyncRunner._interrupt",
        "hooks.py:run_between",
        "worker/outcome.py:failed",
        "worker/assignments.py:Assignments.settle",
        "channel.py:Outcome",
        "supervisor/dispatcher.py:Dispatcher._take",
        "store/turns.py:InFlight.turn",
        "store/lua/turn.lua:move",
    ],
}
MOST_FILES = {"A task's way": 15, "A worker is killed": 10, "A soft timeout": 11}


def name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports(path: Path) -> set[str]:
    """Return the top-level packages that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def defined(path: Path) -> set[str]:
    """Return the functions and classes that a file defines, methods as `Class.method`."""
    if path.suffix == ".lua":
        return set(LUA_DEFINITION.findall(path.read_text()))
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found.add(node.name)
            methods = (ast.FunctionDef, ast.AsyncFunctionDef)
            found |= {f"{node.name}.{m.name}" for m in node.body if isinstance(m, methods)}
    return found


def files_of(section: str) -> list[str]:
    """Return the files of a reading path, each where it comes first."""
    return list(dict.fromkeys(step.partition(":")[0] for step in PATHS[section]))


@pytest.mark.parametrize("library", DOORS)
def test_each_library_is_imported_in_one_place(library):
    assert [name(path) for path in PYTHON if library in imports(path)] == [DOORS[library]]


def test_imports_only_go_down():
    pytest.importorskip("importlinter")  # which is of the group `lint`
    linter = "import sys; from importlinter.cli import lint_imports_command; lint_imports_command()"
    linted = subprocess.run(
        [sys.executable, "-c", linter, "--no-cache"],
        check=False,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )

    assert linted.returncode == 0, linted.stdout


def test_only_keys_spells_keys():
    # "wakaq: no such queue" is a message, "wakaq:emails" would be a key.
    spelled = [name(path) for path in FILES if re.search(r"\bwakaq:\S", path.read_text())]

    assert spelled == ["store/keys.py"]


def test_no_line_is_too_long_to_read():
    too_long = [
        f"{name(path)}:{number}"
        for path in FILES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(PRAGMA.sub("", line)) > MOST_COLUMNS
    ]

    assert {"cli.py", "store/lua/turn.lua"} <= {name(path) for path in FILES}
    assert too_long == []


# -- reading paths ---------------------------------------------------------------------------------


@pytest.mark.parametrize("section", PATHS)
def test_a_reading_path_leads_through_functions_that_exist(section):
    steps = [step.partition(":") for step in PATHS[section]]

    missing = [step for step in steps if step[2] not in defined(PACKAGE / step[0])]
    assert missing == []


@pytest.mark.parametrize("section", PATHS)
def test_a_reading_path_is_short(section):
    assert len(files_of(section)) <= MOST_FILES[section]


@pytest.mark.parametrize("section", PATHS)
def test_the_page_how_it_works_tells_a_reading_path_file_by_file(section):
    page = (REPOSITORY / "docs" / "how-it-works.md").read_text()
    _, *parts = re.split(r"^#+ (.+)$", page, flags=re.MULTILINE)
    sections = dict(zip(parts[::2], parts[1::2], strict=True))

    known = "|".join(re.escape(name(path)) for path in FILES)
    named = re.findall(rf"(?<![\w/.])(?:{known})\b", sections[section])
    assert list(dict.fromkeys(named)) == files_of(section)


# -- the README ------------------------------------------------------------------------------------


def test_the_example_of_the_readme_runs(load_app, start, redis, eventually, tmp_path):
    (example,) = re.findall(
        r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL
    )
    worker = start(load_app(example, name="shop"))
    eventually(lambda: redis.pubsub_numsub("wakaq-broadcast")[0][1] == 1)

    run = subprocess.run(
        [sys.executable, "shop.py"], check=False, cwd=tmp_path, capture_output=True, text=True
    )

    def all_ran():
        said = sorted(worker.output.splitlines())
        assert said == [
            "charged 200 cents for order 2",
            "nothing to report",
            "welcome, ada@example.com",
        ]

    assert (run.stdout, run.stderr) == ("charged 100 cents for order 1\n", "")
    eventually(all_ran, within=10)
