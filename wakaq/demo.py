"""`wakaq demo`: a real worker reads the source of this Python, and loses a process.

Not an example of how to lay out an application: tasks, caller and display share a file, to be read
in one go.
"""

import ast
import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar

from wakaq.app import WakaQ
from wakaq.embedded import EmbeddedServer
from wakaq.store.broker import Broker
from wakaq.store.inspect import Inspector

URL = "WAKAQ_DEMO_URL"  # environment variable: where the demo's worker finds its server
COMMAND = [sys.executable, "-m", "wakaq", "worker", "--app=wakaq.demo.wakaq", "--scheduler"]
MOST_FILES = 1_200
LATEST_END = 120.0  # seconds
REFRESH = 0.1  # seconds
QUEUES = {"small": 4_000, "medium": 12_000, "large": 40_000}  # files below so many bytes
READ, OTHERS = "demo:read", "demo:others"  # hashes in Redis for what the tasks find
LATEST = "demo:latest"  # the process that began to read a file
DELAYS = {f"delayed by {seconds} s": seconds for seconds in (1, 2, 3)}
EXPECTED = ("broadcast", "every second", "soft timeout", "SIGKILL", *DELAYS)  # in OTHERS at the end

wakaq = WakaQ(
    url=os.environ.get(URL),
    queues=[(priority, name) for priority, name in enumerate(QUEUES)],
    concurrency="min(max(cores, 2), 4)",
    schedules=[("* * * * * *", "note", ["every second"])],
)


def redis() -> Any:
    """Return the app's own client."""
    return wakaq.broker.client


@wakaq.task
def read(path: str) -> None:
    """Count what a source file contains.

    To run it twice changes nothing, as it should be for every task.
    """
    redis().set(LATEST, os.getpid())
    source = Path(path).read_bytes()
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError):  # Python's own tests contain such files
        nodes = []
    functions = [one for one in nodes if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = [((node.end_lineno or 0) - node.lineno + 1, node.name) for node in functions]
    counts = source.count(b"\n"), len(re.findall(rb"\w+|[^\w\s]", source)), len(functions)
    found = json.dumps([*counts, *max(lengths, default=(0, ""))])
    redis().hset(READ, path, found)


@wakaq.task(queue="small")
def note(name: str) -> None:
    """Tell that a delayed, periodic or broadcast task ran."""
    now = datetime.now(UTC)
    redis().hset(OTHERS, name, f"ran in process {os.getpid()} at {now:%H:%M:%S} UTC")


@wakaq.task(queue="small", soft_timeout=0.5, max_retries=1)
def dawdle() -> None:
    """Run into the soft timeout, but only once."""
    attempt = redis().incr("demo:attempts")
    if attempt == 1:
        time.sleep(LATEST_END)
    redis().hset(OTHERS, "soft timeout", f"after 0.5 s; attempt {attempt} succeeded")


def run_demo() -> int:
    """Show WakaQ at work for some seconds; return the exit status: 0 if nothing was lost.

    Raises:
        WakaQError: The extra `embedded` is not installed.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that they, too, leave no process behind
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="wakaq-demo-") as folder:
        os.environ[URL] = f"unix://{folder}/redis.sock"
        settings = dataclasses.replace(wakaq.settings, url=os.environ[URL])
        wakaq.broker = Broker(settings, wakaq.queues)
        log = Path(folder, "worker.log")
        with EmbeddedServer(settings, folder), log.open("wb") as output:
            # In a session of its own, by which its processes are found.
            worker = subprocess.Popen(  # noqa: S603 - our own command
                COMMAND, stderr=output, start_new_session=True
            )
            try:
                return run(worker)
            finally:
                if worker.poll() is not None:
                    sys.stderr.write(log.read_text(errors="replace")[-2_000:])
                worker.terminate()
                worker.wait()


def source_files() -> dict[str, str]:
    """Return the source files of Python and its packages, with the queue of each; no huge ones."""
    queues: dict[str, str] = {}
    for folder in ("stdlib", "purelib"):
        for path in sorted(Path(sysconfig.get_path(folder)).rglob("*.py")):
            if path.is_file() and len(queues) < MOST_FILES:
                size = path.stat().st_size
                queues |= {str(path): name for name in reversed(QUEUES) if size < QUEUES[name]}
    return queues


def run(worker: subprocess.Popen[bytes]) -> int:
    """Enqueue everything, show it while it runs, sum up; return the exit status."""
    console = Console(highlight=False, markup=False)
    files = source_files()
    enqueue(files)
    console.print(f"{len(files)} source files are enqueued, small ones first, a task for each")
    deadline = time.monotonic() + LATEST_END
    inspector, listeners = Inspector(wakaq.broker), 0
    with Live(console=console, transient=True, auto_refresh=False) as live:
        while worker.poll() is None and time.monotonic() < deadline:
            done, others = redis().hlen(READ), redis().hkeys(OTHERS)
            if done == len(files) and len(others) == len(EXPECTED):
                break
            listeners = listeners or note.broadcast("broadcast")  # as soon as somebody listens
            if done > len(files) // 2 and b"SIGKILL" not in others:
                kill_a_worker(console)
            lines = [
                f"{queue.pending:8}  wait in queue {queue.name}"
                for queue in inspector.snapshot().queues
            ]
            lines += [f"{done:8}  of {len(files)} files are read", *process_titles(worker.pid)]
            live.update(Group(ProgressBar(len(files), done, 50), *lines), refresh=True)
            time.sleep(REFRESH)
    return sum_up(console, files)


def enqueue(files: Mapping[str, str]) -> None:
    """Enqueue a task for each file, delayed ones, and one that runs too long."""
    with wakaq.batch():
        for path, queue in files.items():
            read.delay(path, queue=queue)
        for name, seconds in DELAYS.items():
            note.delay(name, eta=timedelta(seconds=seconds))
        dawdle.delay()


def kill_a_worker(console: Console) -> None:
    """Kill the worker that was the last to begin a file."""
    victim = int(redis().get(LATEST))
    os.kill(victim, signal.SIGKILL)
    redis().hset(OTHERS, "SIGKILL", f"to process {victim}, a busy worker")
    console.print(f"SIGKILL to process {victim}, a busy worker")


def process_titles(session: int) -> Iterator[str]:
    """Return pids and titles of WakaQ's processes in a session, as `ps` shows them.

    Elsewhere than on Linux there are none.
    """
    for path in Path("/proc").glob("[0-9]*/cmdline"):  # slim images have no `ps`
        with contextlib.suppress(OSError):  # it has ended meanwhile
            pid, title = int(path.parent.name), path.read_text(errors="replace").strip("\0 ")
            if title.startswith("wakaq") and os.getsid(pid) == session:
                yield f"{pid:8}  {title}"


def sum_up(console: Console, files: Collection[str]) -> int:
    """Print what was found and what became of everything; return the exit status."""
    found = {path.decode(): json.loads(row) for path, row in redis().hgetall(READ).items()}
    others = {name.decode(): what.decode() for name, what in redis().hgetall(OTHERS).items()}
    lines, tokens, functions = (sum(row[column] for row in found.values()) for column in range(3))
    console.print(f"{lines:,} lines, {tokens:,} tokens, {functions:,} functions")
    for length, name, path in sorted((*row[3:], path) for path, row in found.items())[-1:]:
        console.print(f"longest function: {name} in {Path(path).name}, {length} lines")
    for name, what in sorted(others.items()):
        console.print(f"{name}: {what}")
    line, status = conclude(files, found, [name for name in EXPECTED if name not in others])
    console.print(line, style="bold red" if status else "bold green", soft_wrap=True)
    return status


def conclude(files: Collection[str], read: Collection[str], missing: list[str]) -> tuple[str, int]:
    """Return the last line and the exit status: 0 if all files were read and nothing is missing."""
    lost = [path for path in files if path not in read]
    losses = f"{len(lost)} missing, among them {lost[0]}" if lost else "none lost"
    unseen = f"not seen: {', '.join(missing)}; " if missing else ""
    status = 1 if lost or missing else 0
    return f"{unseen}{len(files) - len(lost)} of {len(files)} files, {losses}", status
