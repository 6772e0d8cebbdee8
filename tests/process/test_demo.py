"""`wakaq demo`: what it ends with, and that it leaves nothing behind however it ends."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from wakaq.demo import conclude


@pytest.fixture
def folder():
    """A folder for the demo, with a path short enough for a unix socket."""
    with tempfile.TemporaryDirectory(prefix="wakaq-test-") as folder:
        yield Path(folder)


@pytest.fixture
def demo(folder):
    """The demo, running."""
    with subprocess.Popen(
        [sys.executable, "-m", "wakaq", "demo"],
        cwd=folder,
        env=os.environ | {"TMPDIR": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        for left in processes_in(folder):
            left.kill()


def processes_in(folder: Path) -> list[psutil.Process]:
    """Return all processes that work below a folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(folder):
                found.append(process)
    return found


def supervisor_of(demo: subprocess.Popen[str]) -> psutil.Process:
    """Return the demo's supervisor, which has its title once its signal handlers are set."""
    for process in psutil.Process(demo.pid).children():
        if process.cmdline()[0].startswith("wakaq-worker: supervisor"):
            return process
    raise AssertionError("no supervisor yet")


def assert_nothing_is_left(folder: Path) -> None:
    assert [process.cmdline() for process in processes_in(folder)] == []
    # Only ours: what other libraries leave in the folder for temporary files is theirs.
    assert list(folder.glob("wakaq-*")) == []


@pytest.mark.timeout(150)
def test_the_demo_loses_nothing_within_30_seconds(demo, folder, eventually):
    started = time.monotonic()
    output, errors = demo.communicate()
    took = time.monotonic() - started
    last = output.splitlines()[-1]
    numbers = re.fullmatch(r"(\d+) of (\d+) files, none lost", last)

    assert numbers, output
    assert numbers[1] == numbers[2]
    assert int(numbers[1]) >= 500
    assert "SIGKILL" in output
    assert "attempt 2 succeeded" in output
    assert errors == ""
    assert demo.returncode == 0
    # A machine that does something else at the same time may take longer.
    assert took < 30 or os.getloadavg()[0] > 2 * (os.cpu_count() or 1)
    eventually(lambda: assert_nothing_is_left(folder))


def test_a_demo_that_loses_its_supervisor_says_so_and_fails(demo, folder, eventually):
    eventually(lambda: supervisor_of(demo), within=15).kill()
    output, _ = demo.communicate()

    assert "not seen: " in output.splitlines()[-1]
    assert demo.returncode == 1
    eventually(lambda: assert_nothing_is_left(folder))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_demo_that_is_interrupted_leaves_nothing_behind(demo, folder, eventually, number):
    eventually(lambda: supervisor_of(demo), within=15)
    demo.send_signal(number)
    demo.communicate()

    assert demo.returncode != 0
    eventually(lambda: assert_nothing_is_left(folder))


def test_the_last_line_says_what_is_missing():
    assert conclude({"a": "x", "b": "y"}, ["b", "a"], []) == ("2 of 2 files, none lost", 0)
    assert conclude(["a", "b"], ["b"], []) == ("1 of 2 files, 1 missing, among them a", 1)
    assert conclude(["a"], ["a"], ["SIGKILL"]) == ("not seen: SIGKILL; 1 of 1 files, none lost", 1)
