"""`wakaq demo`: a real worker on a real server reads the source of this Python installation, and loses a process.

Not an example of how to lay out an application: tasks, caller and display share a file, to be read in one go.
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
import warnings
from collections.abc import Collection, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from wakaq.app import WakaQ
from wakaq.broker import Broker
from wakaq.embedded import EmbeddedServer

URL = "WAKAQ_DEMO_URL"  # environment variable: where the demo's worker finds its server
COMMAND = [sys.executable, "-m", "wakaq", "worker", "--app=wakaq.demo.wakaq", "--scheduler"]
MOST_FILES = 1_500
LATEST_END = 120.0
QUEUES = {"small": 4_000, "medium": 12_000, "large": 40_000}  # files below so many bytes
READ, OTHERS = "demo:read", "demo:others"  # hashes in Redis for what the tasks find
DELAYS = {f"delayed by {seconds} s": seconds for seconds in (1, 2, 3)}

wakaq = WakaQ(
    url=os.environ.get(URL),
    queues=[(priority, name) for priority, name in enumerate(QUEUES)],
    concurrency="min(max(cores, 2), 8)",
    schedules=[("* * * * * *", "note", ["every second"])],
)


def redis() -> Any:
    """Return the app's own client."""
    return wakaq.broker.client


@wakaq.task
def read(path: str) -> None:
    """Count what a source file contains; to run twice changes nothing, as it should be for every task."""
    source = Path(path).read_bytes()
    try:
        with warnings.catch_warnings(action="ignore"):
            nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError):  # Python's own tests contain such files
        nodes = []
    functions = [one for one in nodes if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = [((node.end_lineno or 0) - node.lineno + 1, node.name) for node in functions]
    counts = source.count(b"\n"), len(re.findall(rb"\w+|[^\w\s]", source)), len(functions)
    redis().hset(READ, path, json.dumps([*counts, *max(lengths, default=(0, ""))]))


@wakaq.task(queue="small")
def note(name: str, due: datetime | None = None) -> None:
    """Tell that a delayed, periodic or broadcast task ran, and how late."""
    now = datetime.now(UTC).replace(tzinfo=None)
    late = f", {(now - due).total_seconds() * 1000:.0f} ms late" if due else ""
    redis().hset(OTHERS, name, f"ran in process {os.getpid()} at {now:%H:%M:%S} UTC{late}")


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
        with EmbeddedServer(settings, folder), worker_process(Path(folder, "log")) as worker:
            return Show(worker).run()


@contextlib.contextmanager
def worker_process(log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a worker as long as the block runs, and show its last words if it ends before."""
    with log.open("wb") as output:
        # In a session of its own, by which its processes are found.
        worker = subprocess.Popen(COMMAND, stderr=output, start_new_session=True)  # noqa: S603
    try:
        yield worker
    finally:
        if worker.poll() is not None:
            sys.stderr.write(log.read_text(errors="replace")[-2_000:])
        worker.terminate()
        worker.wait()


def source_files() -> dict[str, str]:
    """Return the source files of Python and its packages, but for some huge ones, with the queue of each."""
    queues: dict[str, str] = {}
    for folder in (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")):
        for path in sorted(folder.rglob("*.py")):
            is_inner = "-packages/" in str(path.relative_to(folder))
            if path.is_file() and not is_inner and len(queues) < MOST_FILES:
                size = path.stat().st_size
                queues |= {str(path): name for name in reversed(QUEUES) if size < QUEUES[name]}
    return queues


def process_titles(session: int) -> dict[int, str]:
    """Return the titles of WakaQ's processes in a session, as `ps` shows them."""
    rows: list[list[str]] = []
    if Path("/proc/self").exists():  # slim images of Linux have no `ps`
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                rows.append([path.parent.name, path.read_text(errors="replace")])
    else:
        listing = subprocess.check_output(["ps", "-A", "-o", "pid=,args="], text=True)  # noqa: S607
        rows += [line.split(maxsplit=1) for line in listing.splitlines()]
    titles = {}
    for pid, *title in rows:
        with contextlib.suppress(ProcessLookupError):
            if "".join(title).startswith("wakaq") and os.getsid(int(pid)) == session:
                titles[int(pid)] = title[0].strip("\0 ")
    return titles


def verdict(files: Collection[str], read: Collection[str], missing: list[str]) -> tuple[str, int]:
    """Return the last line and the exit status."""
    lost = [path for path in files if path not in read]
    fate = f"{len(lost)} missing, among them {lost[0]}" if lost else "none lost"
    unseen = f"not seen: {', '.join(missing)}; " if missing else ""
    status = int(bool(lost or missing))
    return f"{unseen}{len(files) - len(lost)} of {len(files)} files, {fate}", status


class Show:
    """What the parent process does: enqueue, watch, kill, sum up."""

    def __init__(self, worker: subprocess.Popen[bytes]) -> None:
        self.console = Console(highlight=False, markup=False)
        self.worker = worker
        self.files = source_files()
        self.started = time.monotonic()
        self.reached = 0  # by the broadcast
        self.victim = ""

    def run(self) -> int:
        """Show everything; return the exit status."""
        with wakaq.batch():
            for path, queue in self.files.items():
                read.delay(path, queue=queue)
            for name, seconds in DELAYS.items():
                due = datetime.now(UTC) + timedelta(seconds=seconds)
                note.delay(name, due, eta=due)
            dawdle.delay()
        self.say(f"{len(self.files)} source files are enqueued, small ones first, a task for each")
        with Live(console=self.console, transient=True, auto_refresh=False) as live:
            while self.worker.poll() is None and time.monotonic() < self.started + LATEST_END:
                done = redis().hlen(READ)
                if done >= len(self.files) and not self.missing():
                    break
                titles = process_titles(self.worker.pid)
                self.act(done, titles)
                live.update(self.frame(done, titles), refresh=True)
                time.sleep(0.1)
        return self.sum_up()

    def say(self, text: str) -> None:
        self.console.print(f"{time.monotonic() - self.started:5.1f} s  {text}")

    def act(self, done: int, titles: dict[int, str]) -> None:
        """Broadcast as soon as somebody listens, and kill a worker process in the middle."""
        self.reached = self.reached or note.broadcast("broadcast")
        busy = [pid for pid, title in titles.items() if title.endswith("running read")]
        if not self.victim and busy and done > len(self.files) * 3 // 4:
            os.kill(busy[0], signal.SIGKILL)
            self.victim = f"process {busy[0]}, {titles[busy[0]]!r}"
            self.say(f"SIGKILL to {self.victim}")

    def missing(self) -> list[str]:
        """Return what else has not happened yet."""
        seen = {name.decode() for name in redis().hkeys(OTHERS)}
        expected = ["broadcast", "every second", "soft timeout", *DELAYS]
        return [name for name in expected if name not in seen] + ["SIGKILL"] * (not self.victim)

    def frame(self, done: int, titles: dict[int, str]) -> Group:
        """Return what the terminal shows now."""
        total = len(self.files)
        queues, processes = Table("queue", "waiting", box=None), Table("pid", "title", box=None)
        for queue in wakaq.queues:
            queues.add_row(queue.name, str(redis().llen(wakaq.broker.keys.queue(queue))))
        for pid, title in sorted(titles.items()):
            processes.add_row(str(pid), title, style="bold" if "running" in title else "dim")
        top, tables = Table.grid(padding=(0, 2)), Table.grid(padding=(0, 2))
        top.add_row(ProgressBar(total, done, width=50), f"{done} of {total} files")
        tables.add_row(queues, processes)
        return Group(top, tables)

    def sum_up(self) -> int:
        """Print what was found and what became of everything; return the exit status."""
        self.say("the end")
        found = {name.decode(): json.loads(row) for name, row in redis().hgetall(READ).items()}
        table = Table.grid(padding=(0, 2))
        for column, name in enumerate(("lines", "tokens", "functions")):
            table.add_row(name, f"{sum(row[column] for row in found.values()):,}")
        for length, name, path in sorted((*row[3:], path) for path, row in found.items())[-1:]:
            table.add_row("longest function", f"{name} in {Path(path).name}, {length} lines")
        for name, what in sorted(redis().hgetall(OTHERS).items()):
            table.add_row(name.decode(), what.decode())
        stats = [wakaq.broker.keys.stats(queue) for queue in wakaq.queues]
        again = sum(int(redis().hget(key, "redelivered") or 0) for key in stats)
        table.add_row("SIGKILL", f"{self.victim or 'to nobody'}; {again} of its tasks ran again")
        self.console.print(table)
        line, status = verdict(self.files, found, self.missing())
        self.console.print(line, style="bold red" if status else "bold green", soft_wrap=True)
        return status
