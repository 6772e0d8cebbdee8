"""Shows queues and workers: as tables, as JSON, or refreshed in place. Not for counting: that is `inspector`'s part."""

import json
import sys
import time
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from wakaq.broker import OUTAGES
from wakaq.errors import WakaQError
from wakaq.inspector import Inspector, Snapshot

_REFRESH = 1.0  # seconds
_HISTORY = 300  # refreshes, of which as many are drawn as the terminal is wide
_BARS = "▁▂▃▄▅▆▇█"


class Sample(NamedTuple):
    """What the sparklines show of a moment."""

    done: int  # since the queues have been there
    backlog: int
    at: float


def show(inspector: Inspector, *, as_json: bool, watch: bool) -> None:
    """Write a snapshot to stdout, or with `watch` one a second until Ctrl-C.

    Raises:
        WakaQError: There is no terminal to refresh.
    """
    console = Console(highlight=False, markup=False)
    if as_json:
        sys.stdout.write(json.dumps(to_dict(inspector, inspector.look()), indent=2) + "\n")
    elif not watch:
        console.print(tables(inspector.look(), {}))
    elif not console.is_terminal:
        raise WakaQError("--watch needs a terminal; for programs there is --json")
    else:
        try:
            refresh(inspector, console)
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


def refresh(inspector: Inspector, console: Console) -> None:
    """Show a snapshot each second, with the rates since the last one."""
    history: deque[Sample] = deque(maxlen=_HISTORY)
    last: tuple[Snapshot, float] | None = None
    frame: RenderableType = ""
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            now = time.monotonic()
            try:
                snapshot = inspector.look()
            except OUTAGES as error:
                live.update(Group(f"Redis is away, trying again: {error}", frame), refresh=True)
            else:
                counts = [counts for _, counts in snapshot.queues]
                done = sum(one.stats["done"] for one in counts)
                history.append(Sample(done, sum(one.pending for one in counts), now))
                frame = Group(
                    *sparklines(history, console.width),
                    tables(snapshot, rates(last, (snapshot, now))),
                )
                live.update(frame, refresh=True)
                last = snapshot, now
            time.sleep(_REFRESH)


def rates(
    last: tuple[Snapshot, float] | None, this: tuple[Snapshot, float]
) -> dict[str, tuple[float, float]]:
    """Return how many tasks of each queue were done and how many failed, per second; nothing from one snapshot alone."""
    if last is None:
        return {}
    passed = this[1] - last[1]
    pairs = zip(last[0].queues, this[0].queues, strict=True)
    return {
        queue.name: (
            (after.stats["done"] - before.stats["done"]) / passed,
            (after.failed - before.failed) / passed,
        )
        for (queue, before), (_, after) in pairs
    }


def sparklines(history: deque[Sample], width: int) -> Iterator[Text]:
    """Return a line of throughput and a line of backlog."""
    samples = list(history)
    per_second = [(b.done - a.done) / (b.at - a.at) for a, b in pairwise(samples)]
    lines = (("done/s", per_second), ("pending", [float(sample.backlog) for sample in samples]))
    for name, values in lines:
        recent = values[-(width - 22) :]
        now = f"{recent[-1]:,.0f}" if recent else "-"
        yield Text(f"{name:8}{now:>12}  {sparkline(recent)}", no_wrap=True)


def sparkline(values: list[float]) -> str:
    """Return a bar for each value, the highest one for the greatest."""
    top = max(values, default=0.0) or 1.0
    return "".join(_BARS[min(len(_BARS) - 1, int(value / top * len(_BARS)))] for value in values)


def tables(snapshot: Snapshot, per_second: dict[str, tuple[float, float]]) -> Group:
    """Return queues and workers as they fit 80 columns; totals where there are no rates."""
    unit = "/s" if per_second else ""
    names = ("priority", "pending", "delayed", "in flight", "dead", f"done{unit}", f"failed{unit}")
    queues = Table("queue", box=None, pad_edge=False)
    for name in names:
        queues.add_column(name, justify="right")
    for queue, counts in snapshot.queues:
        done, failed = per_second.get(queue.name, (counts.stats["done"], counts.failed))
        numbers = (counts.pending, counts.delayed, counts.inflight, counts.dead_letters)
        cells = [f"{number:,.0f}" for number in (*numbers, done, failed)]
        priority = "" if queue.priority is None else str(queue.priority)
        queues.add_row(queue.name, priority, *cells, style="" if any(numbers) else "dim")
    workers = Table("host", "pid", "worker", box=None, pad_edge=False)
    workers.add_column("runs", no_wrap=True, ratio=1, overflow="ellipsis")
    workers.add_column("for", justify="right")
    workers.add_column("MB", justify="right")
    for entry in snapshot.supervisors.values():
        for child in entry["children"]:
            workers.add_row(str(entry.get("host")), *_child_row(child))
    return Group(queues, "", workers, f"{len(snapshot.supervisors)} x wakaq-worker")


def _child_row(child: dict[str, Any]) -> tuple[str, ...]:
    tasks = child.get("tasks") or []
    what = tasks[0]["name"] if tasks else "idle"
    more = f"{len(tasks)} tasks, the first: " if len(tasks) > 1 else ""
    silent = "does not answer: " if child.get("is_silent") else ""
    seconds = f"{tasks[0]['seconds']:,.0f} s" if tasks else ""
    memory = f"{child.get('rss', 0) / 1e6:,.0f}"
    return str(child.get("pid")), str(child.get("number")), silent + more + what, seconds, memory
