"""Shows queues and workers: as tables, as JSON, or refreshed in place. Not for counting: that is `inspector`'s part."""

import json
import sys
import time
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from wakaq.client import OUTAGES
from wakaq.errors import WakaQError
from wakaq.inspector import Inspector

_REFRESH = 1.0  # seconds
_HISTORY = 300  # refreshes, of which as many are drawn as the terminal is wide
_BARS = "▁▂▃▄▅▆▇█"
_COUNTS = {
    "pending": "pending_tasks",
    "delayed": "pending_eta_tasks",
    "in flight": "inflight_tasks",
    "dead": "dead_letters",
}
# Moments, and the queues as `Inspector.look` counted them then.
History = deque[tuple[float, dict[str, Any]]]


def show(inspector: Inspector, *, as_json: bool, watch: bool) -> None:
    """Write to stdout what is there now, or with `watch` refresh it each second until Ctrl-C.

    Raises:
        WakaQError: There is no terminal to refresh.
    """
    console = Console(highlight=False, markup=False)
    if as_json:
        sys.stdout.write(json.dumps(inspector.look(), indent=2) + "\n")
    elif not watch:
        console.print(tables(inspector.look(), {}))
    elif not console.is_terminal:
        raise WakaQError("--watch needs a terminal; for programs there is --json")
    else:
        try:
            _refresh(inspector, console)
        except KeyboardInterrupt:
            return


def _refresh(inspector: Inspector, console: Console) -> None:
    history: History = deque(maxlen=_HISTORY)
    frame = Group()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            news = ""
            try:
                found = inspector.look()
            except OUTAGES as error:
                news = f"Redis is away, trying again: {error}"
            else:
                history.append((time.monotonic(), found["queues"]))
                lines = sparklines(history, console.width - 22)
                frame = Group(*lines, "", tables(found, rates(history)))
            live.update(Group(news, frame), refresh=True)
            time.sleep(_REFRESH)


def _totals(queue: dict[str, Any]) -> tuple[int, int]:
    """Return how many runs of tasks went well, and how many did not, whether or not they were tried again."""
    return queue["stats"]["done"], queue["stats"]["retried"] + queue["stats"]["dead"]


def rates(history: History) -> dict[str, list[float]]:
    """Return how many tasks of each queue were done and how many failed, per second; nothing before two refreshes."""
    found = {}
    for (begin, before), (end, after) in pairwise(list(history)[-2:]):
        for name in after:
            changes = zip(_totals(before[name]), _totals(after[name]), strict=True)
            found[name] = [(new - old) / (end - begin) for old, new in changes]
    return found


def sparklines(history: History, width: int) -> Iterator[Text]:
    """Return a line of throughput and a line of backlog."""
    pending = [sum(queue["pending_tasks"] for queue in queues.values()) for _, queues in history]
    done = [(at, sum(_totals(queue)[0] for queue in queues.values())) for at, queues in history]
    per_second = [(b - a) / (end - begin) for (begin, a), (end, b) in pairwise(done)]
    for name, values in (("done/s", per_second), ("pending", pending)):
        top = max(values[-width:], default=0) or 1
        bars = (_BARS[min(7, int(value / top * 8))] for value in values[-width:])
        now = f"{values[-1]:,.0f}" if values else "-"
        yield Text(f"{name:8}{now:>12}  {''.join(bars)}", no_wrap=True)


def tables(found: dict[str, Any], per_second: dict[str, list[float]]) -> Group:
    """Return queues and workers as they fit 80 columns; totals where there are no rates."""
    queues = Table("queue", box=None, pad_edge=False)
    unit = "/s" if per_second else ""
    for column in ("priority", *_COUNTS, f"done{unit}", f"failed{unit}"):
        queues.add_column(column, justify="right")
    for name, queue in found["queues"].items():
        priority = "" if queue["priority"] is None else str(queue["priority"])
        numbers = [queue[key] for key in _COUNTS.values()]
        numbers += per_second.get(name) or _totals(queue)
        queues.add_row(name, priority, *(f"{number:,.0f}" for number in numbers))
    workers = Table("host", box=None, pad_edge=False)
    for column in ("pid", "worker", "runs", "for", "MB"):
        workers.add_column(column, justify="left" if column == "runs" else "right")
    for supervisor in found["supervisors"]:
        for child in supervisor["children"]:
            workers.add_row(_shortened(supervisor["host"]), *_cells(child))
    return Group(queues, "", workers, f"{found['workers']} x wakaq-worker")


def _cells(child: dict[str, Any]) -> Iterator[str | Text]:
    tasks = child["tasks"] or [{"name": "idle"}]
    more = f"{len(tasks)} tasks, such as " if len(tasks) > 1 else ""
    silent = "does not answer: " if child.get("is_silent") else ""
    yield str(child["pid"])
    yield str(child["number"])
    yield _shortened(silent + more + tasks[0]["name"])
    yield f"{tasks[0]['seconds']:,.0f} s" if "seconds" in tasks[0] else ""
    yield f"{child.get('rss', 0) / 1e6:,.0f}"


def _shortened(text: str) -> Text:
    # Of its own, not of its column: so the column gives way to those that may not be cut.
    return Text(text, no_wrap=True, overflow="ellipsis")
