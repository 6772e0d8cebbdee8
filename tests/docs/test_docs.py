"""The pages are true.

Their Python runs, their commands exist, their tables are complete, their links lead somewhere.

In README, quickstart and guide, all Python blocks of a page are one program: those that only
import, define and assign are its module `shop`, for which a real worker runs; the others are then
executed as an application would. A new `wakaq = WakaQ(` begins a new program. The address of Redis
is put into each. A block that begins with `# name.py` is that file, and `<!-- not run: why -->` in
front of a block says that it is not run.
"""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest

import wakaq
from wakaq.cli import main as commands

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
GUIDE = sorted(DOCS.glob("guide/*.md"))
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted(DOCS.glob("*.md")),
    *GUIDE,
]
NAMES = ("README.md", "docs/quickstart.md", "docs/configuration.md", "docs/migrating.md")
RUN = [*(REPOSITORY / name for name in NAMES), *GUIDE]
# What the pages show failing, by page: reasons of the dead letters that are left.
DEAD = {"timeouts-and-retries": ["raised"]}
FENCE = re.compile(r"^( *)```([\w-]+)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A fenced block."""

    language: str
    text: str
    is_run: bool

    @property
    def defines(self) -> bool:
        """Whether it does nothing but what a module does when it is imported."""
        kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.Assign)
        return all(isinstance(node, (*kinds, ast.AnnAssign)) or is_main(node) for node in self.tree)

    @property
    def tree(self) -> list[ast.stmt]:
        return ast.parse(self.text).body


def is_main(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)


def blocks(path: Path, language: str) -> list[Block]:
    text = path.read_text()
    found = []
    for fence in FENCE.finditer(text):
        above = text[: fence.start()].rstrip().rpartition("\n")[2]
        found.append(Block(fence[2], fence[3], not above.startswith("<!-- not run: ")))
    return [block for block in found if block.language == language]


def programs(path: Path) -> Iterator[list[Block]]:
    program: list[Block] = []
    imports: list[str] = []  # which later programs need not repeat
    for block in blocks(path, "python"):
        if not block.is_run or re.match(r"# \w+\.py\n", block.text):
            continue
        if program and re.search(r"^wakaq = WakaQ\(", block.text, re.MULTILINE):
            yield program
            program = [Block("python", "\n".join(imports), is_run=True)]
        program.append(block._replace(text=with_address(block.text)))
        kinds = ast.Import, ast.ImportFrom
        imports += [ast.unparse(node) for node in block.tree if isinstance(node, kinds)]
    if program:
        yield program


def with_address(source: str) -> str:
    """Return the source of an application with the address of the test's Redis."""
    if " url=" in source:
        return source
    return re.sub(r"WakaQ\((?=\S|\n)", "WakaQ(url=__import__('os').environ['REDIS_URL'], ", source)


CASES = [
    pytest.param(path, program, id=f"{path.stem}-{number}")
    for path in RUN
    for number, program in enumerate(programs(path))
]


@pytest.mark.parametrize(("path", "program"), CASES)
def test_the_python_of_a_page_runs(path, program, load_app, start, eventually, tmp_path, redis):  # noqa: PLR0913, PLR0917
    source = "\n".join(block.text for block in program if block.defines)
    shop = load_app(source, name="shop")
    worker = start(shop)
    eventually(lambda: redis.pubsub_numsub("wakaq-broadcast")[0][1] == 1, within=15)
    for block in program:
        if not block.defines:
            exec(compile(block.text, str(path), "exec"), vars(shop))
    if "__main__" in source:
        subprocess.run([sys.executable, "shop.py"], check=True, cwd=tmp_path, env=os.environ)
    names = [queue.name for queue in shop.wakaq.queues]

    def all_have_run() -> None:
        soon = redis.time()[0] + 10
        assert [redis.llen(f"wakaq:{name}") for name in names] == [0] * len(names)
        assert [redis.zcount(f"wakaq:eta:{name}", 0, soon) for name in names] == [0] * len(names)
        assert redis.keys("wakaq:inflight:*") == []

    eventually(all_have_run, within=10)
    if any(".broadcast(" in block.text for block in program):  # which Redis does not know of
        eventually(lambda: bool(worker.output) or " args=" in worker.log)
    letters = [letter for name in names for letter in redis.lrange(f"wakaq:dead:{name}", 0, -1)]

    expected = DEAD.get(path.stem, [])
    assert [json.loads(one)["reason"] for one in letters] == expected, worker.log
    assert worker.log.count(" ERROR ") == len(expected), worker.log
    assert "is unknown" not in worker.log
    assert worker.stop() == 0
    if ".delay(" in "".join(block.text for block in program) and "synchronous" not in source:
        assert any(int(redis.hget(f"wakaq:stats:{name}", "done") or 0) for name in names)
    if path.stem == "quickstart":
        (expected,) = [block.text for block in blocks(path, "text")]
        assert sorted(worker.output.splitlines()) == sorted(expected.splitlines())


def test_the_tests_of_the_page_on_testing_pass(tmp_path):
    names = []
    for block in blocks(DOCS / "guide" / "testing.md", "python"):
        if match := re.match(r"# (\w+\.py)\n", block.text):
            names.append(match[1])
            (tmp_path / match[1]).write_text(block.text)
    (configuration,) = blocks(DOCS / "guide" / "testing.md", "toml")
    (tmp_path / "pyproject.toml").write_text(configuration.text)
    options = ["-q", "-p", "no:cacheprovider", "-p", "pytest_wakaq"]
    command = [sys.executable, "-m", "pytest", *options]
    run = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True)

    assert names == ["shop.py", "test_enqueued.py", "test_in_place.py", "test_server.py"]
    assert "3 passed" in run.stdout, run.stdout


def test_only_other_libraries_code_is_not_run():
    skipped = [block.text for path in RUN for block in blocks(path, "python") if not block.is_run]

    assert [text.partition("\n")[0] for text in skipped] == ["# Celery", "# RQ"]


# -- commands --------------------------------------------------------------------------------------


def resolve(words: list[str]) -> tuple[click.Command, list[str]]:
    """Return the command that a line calls, and its options."""
    names = words[0].split("-", 1)[1:] + words[1:]
    command: click.Command = commands
    while isinstance(command, click.Group) and names and names[0] in command.commands:
        command = command.commands[names.pop(0)]
    return command, [word.partition("=")[0] for word in names if word.startswith("--")]


def command_lines() -> list[tuple[str, str]]:
    found = []
    for path in PAGES:
        text = path.read_text()
        lines = [line for block in blocks(path, "sh") for line in block.text.splitlines()]
        lines += re.findall(r"`(wakaq[- ](?!broadcast)[^`]*)`", text)
        lines += re.findall(r"^ExecStart=\S*/(wakaq-.*)$", text, re.MULTILINE)
        found += [(path.stem, line) for line in lines if re.match(r"wakaq[- ]\w", line)]
    return found


def test_every_command_of_the_pages_exists_with_its_options():
    wrong = []
    for page, line in command_lines():
        command, options = resolve(re.sub(r"[|&>].*", "", line).split())
        known = {option for one in command.params for option in one.opts} | {"--help", "--version"}
        if command is commands and not {"--help", "--version"} & set(options):
            wrong.append((page, line, "no such command"))
        wrong += [(page, line, option) for option in options if option not in known]

    assert wrong == []


def leaves(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        for one in command.commands.values():
            yield from leaves(one, f"{name} {one.name}")
    else:
        yield name, command


def test_the_page_of_commands_has_them_all():
    text = (DOCS / "cli.md").read_text()

    for name, command in leaves(commands, "wakaq"):
        assert f"`{name}`" in text
        for option in command.params:
            if isinstance(option, click.Option):
                assert f"`{option.opts[-1]}" in text or f" {option.opts[-1]}" in text, option.opts


# -- tables and reference --------------------------------------------------------------------------


def rows() -> dict[str, str]:
    text = (DOCS / "configuration.md").read_text().partition("## A queue's options")[0]
    return dict(re.findall(r"^\| `(\w+)` \| `?([^`|]*)`? \|", text, re.MULTILINE))


def test_every_option_is_in_the_configuration_with_its_default():
    expected = {}
    for name, parameter in inspect.signature(wakaq.WakaQ).parameters.items():
        default = parameter.default
        text = getattr(default, "__name__", repr(default)).replace("'", '"')
        expected[name] = "required" if default is parameter.empty else text

    assert {name: default.replace("_", "") for name, default in rows().items()} == {
        name: default.replace("_", "") for name, default in expected.items()
    }


def public_members(kind: type) -> list[str]:
    return [
        name
        for name, value in vars(kind).items()
        if not name.startswith("_")
        and (callable(value) or isinstance(value, property | classmethod) or hasattr(value, "func"))
    ]


@pytest.mark.parametrize("name", wakaq.__all__)
def test_every_public_name_is_explained_in_the_reference(name):
    text = (DOCS / "reference.md").read_text()
    kind = getattr(wakaq, name)
    (entry,) = re.findall(
        rf"auto(?:class|exception):: wakaq\.{name}(?:\(\))?\n((?: +:.*\n)*)", text
    )
    listed = set(re.findall(r"\w+", entry)) | set(re.findall(rf"wakaq\.{name}\.(\w+)", text))

    assert inspect.getdoc(kind)
    for member in public_members(kind):
        assert inspect.getdoc(inspect.getattr_static(kind, member)), f"{name}.{member}"
        assert member in listed, f"{name}.{member}"


# -- links -----------------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """Return what can stand after a # in a link to a page."""
    text = FENCE.sub("", path.read_text())
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.replace(" ", "-") for title in plain}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_link_leads_somewhere(path):
    text = FENCE.sub("", path.read_text())
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        if "://" not in target and not (
            there.exists() and (not anchor or anchor in anchors(there))
        ):
            lost.append(target)

    assert lost == []


def test_every_page_is_in_a_table_of_contents():
    index = (DOCS / "index.md").read_text()
    toctrees = "".join(re.findall(r"```{toctree}\n(.*?)```", index, re.DOTALL))

    assert set(re.findall(r"^[\w/-]+$", toctrees, re.MULTILINE)) == {
        path.relative_to(DOCS).with_suffix("").as_posix()
        for path in PAGES
        if path.is_relative_to(DOCS) and path.name != "index.md"
    }


def test_the_quickstart_is_short():
    assert len((DOCS / "quickstart.md").read_text().splitlines()) <= 100
