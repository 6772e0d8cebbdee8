"""What the package promises about itself: how small it is, who may import what, and that its README is true."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import wakaq

MOST_LINES = 6_446
REPOSITORY = Path(__file__).parent.parent
PACKAGE = Path(wakaq.__file__).parent
PYTHON = sorted(PACKAGE.rglob("*.py"))
FILES = sorted([*PYTHON, *PACKAGE.rglob("*.lua")])
DOORS = {
    "redis": "client.py",
    "croniter": "cron.py",
    "psutil": "supervisor/memory.py",
    "setproctitle": "titles.py",
    "click": "cli.py",
}


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


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


def test_the_package_does_not_grow():
    # The goal is 3,500; each release may only come nearer.
    counts = {name(path): lines(path) for path in FILES}

    assert "broker.py" in counts
    assert "lua/turn.lua" in counts
    assert sum(counts.values()) <= MOST_LINES, counts


def test_no_file_is_too_long_to_read():
    assert {name(path): lines(path) for path in FILES if lines(path) > 300} == {}


@pytest.mark.parametrize("library", DOORS)
def test_each_library_is_imported_in_one_place(library):
    assert [name(path) for path in PYTHON if library in imports(path)] == [DOORS[library]]


def test_only_keys_spells_keys():
    # "wakaq: no such queue" is a message, "wakaq:emails" would be a key.
    spelled = [name(path) for path in FILES if re.search(r"\bwakaq:\S", path.read_text())]

    assert spelled == ["keys.py"]


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
