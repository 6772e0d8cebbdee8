"""Shows queues and workers: as tables, as JSON, or refreshed in place. Not for counting: that is `inspector`'s part."""

import json
import sys
import time
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from wakaq.client import OUTAGES
from wakaq.errors import WakaQError
from wakaq.inspector import Counts, Inspector, Snapshot

_REFRESH = 1.0  # seconds
_HISTORY = 300  # refreshes, of which as many are drawn as the terminal is wide
_BARS = "▁▂▃▄▅▆▇█"
# Moments, and the counts of each queue then.
History = deque[tuple[float, list[Counts]]]


def show(inspector: Inspector, *, as_json: bool, watch: bool) -> None:
    """Write a snapshot to stdout, or with `watch` one a second until Ctrl-C.

    Raises:
        WakaQError: There is no terminal to refresh.
    """
    console = Console(highlight=False, markup=False)
    if as_json:
        sys.stdout.write(json.dumps(to_dict(inspector, inspector.look()), indent=2) + "\n")
    elif not watch:
        console.print(tables(inspector.look(), []))
    elif not console.is_terminal:
        raise WakaQError("--watch needs a terminal; for programs there is --json")
    else:
        try:
            _refresh(inspector, console)
        except KeyboardInterrupt:
            return


def to_dict(inspector: Inspector, snapshot: Snapshot) -> dict[str, Any]:
    """Return a snapshot as the JSON that the command promises."""
    queues = {
        queue.name: {
            "name": queue.name,
            "priority": queue.priority,
            "broker_key": inspector.keys.queue(queue),
            "broker_eta_key": inspector.keys.eta(queue),
            "pending_tasks": counts.pending,
            "pending_eta_tasks": counts.delayed,
            "inflight_tasks": counts.inflight,
            "dead_letters": counts.dead_letters,
            "stats": counts.stats,
        }
        for queue, counts in snapshot.queues
    }
    supervisors = [{"id": name, **entry} for name, entry in snapshot.supervisors.items()]
    return {"queues": queues, "workers": len(supervisors), "supervisors": supervisors}


def _refresh(inspector: Inspector, console: Console) -> None:
    history: History = deque(maxlen=_HISTORY)
    frame: RenderableType = ""
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            news = ""
            try:
                snapshot = inspector.look()
            except OUTAGES as error:
                news = f"Redis is away, trying again: {error}"
            else:
                history.append((time.monotonic(), [counts for _, counts in snapshot.queues]))
                lines = sparklines(history, console.width - 22)
                frame = Group(*lines, "", tables(snapshot, rates(history)))
            live.update(Group(news, frame), refresh=True)
            time.sleep(_REFRESH)


def rates(history: History) -> list[tuple[float, float]]:
    """Return how many tasks of each queue were done and how many failed, per second; nothing before two refreshes."""
    for (begin, before), (end, after) in pairwise(list(history)[-2:]):
        pairs = zip(before, after, strict=True)
        changes = [(b.stats["done"] - a.stats["done"], b.failed - a.failed) for a, b in pairs]
        return [(done / (end - begin), failed / (end - begin)) for done, failed in changes]
    return []


def sparklines(history: History, width: int) -> Iterator[Text]:
    """Return a line of throughput and a line of backlog."""
    pending = [float(sum(one.pending for one in counts)) for _, counts in history]
    totals = [(at, sum(one.stats["done"] for one in counts)) for at, counts in history]
    per_second = [(b - a) / (end - begin) for (begin, a), (end, b) in pairwise(totals)]
    for name, values in (("done/s", per_second), ("pending", pending)):
        top = max(values[-width:], default=0.0) or 1.0
        bars = (_BARS[min(7, int(value / top * 8))] for value in values[-width:])
        now = f"{values[-1]:,.0f}" if values else "-"
        yield Text(f"{name:8}{now:>12}  {''.join(bars)}", no_wrap=True)


def tables(snapshot: Snapshot, per_second: list[tuple[float, float]]) -> Group:
    """Return queues and workers as they fit 80 columns; totals where there are no rates."""
    unit = "/s" if per_second else ""
    names = ("priority", "pending", "delayed", "in flight", "dead", f"done{unit}", f"failed{unit}")
    queues = Table("queue", box=None, pad_edge=False)
    for name in names:
        queues.add_column(name, justify="right")
    for number, (queue, counts) in enumerate(snapshot.queues):
        totals = (counts.stats["done"], counts.failed)
        rest = per_second[number] if per_second else totals
        numbers = (counts.pending, counts.delayed, counts.inflight, counts.dead_letters, *rest)
        priority = "" if queue.priority is None else str(queue.priority)
        queues.add_row(queue.name, priority, *(f"{value:,.0f}" for value in numbers))
    workers = Table("host", box=None, pad_edge=False)
    for name in ("pid", "worker", "runs", "for", "MB"):
        is_text = name == "runs"
        workers.add_column(name, justify="left" if is_text else "right", no_wrap=not is_text)
    for entry in snapshot.supervisors.values():
        for child in entry["children"]:
            workers.add_row(_shortened(str(entry.get("host"))), *_describe(child))
    return Group(queues, "", workers, f"{len(snapshot.supervisors)} x wakaq-worker")


def _shortened(text: str) -> Text:
    # Of its own, not of its column: so the column gives way to those that may not be cut.
    return Text(text, no_wrap=True, overflow="ellipsis")


def _describe(child: dict[str, Any]) -> Iterator[str | Text]:
    yield str(child.get("pid"))
    yield str(child.get("number"))
    tasks = child.get("tasks") or [{"name": "idle"}]
    more = f"{len(tasks)} tasks, such as " if len(tasks) > 1 else ""
    silent = "does not answer: " if child.get("is_silent") else ""
    yield _shortened(silent + more + tasks[0]["name"])
    yield f"{tasks[0]['seconds']:,.0f} s" if "seconds" in tasks[0] else ""
    yield f"{child.get('rss', 0) / 1e6:,.0f}"
