"""Shows queues and workers: as tables, as JSON, or refreshed in place.

Not for counting: that is `wakaq.store.inspect`.
"""

import json
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from wakaq.errors import WakaQError
from wakaq.store.connection import RedisError, is_outage
from wakaq.store.inspect import Inspector, QueueStats, Snapshot, WorkerInfo

_REFRESH = 1.0  # seconds
_HISTORY = 300  # refreshes, of which as many are drawn as the terminal is wide
_BARS = "▁▂▃▄▅▆▇█"
_SPARKLINE_LABEL = 22  # columns in front of a sparkline
_COUNTS = ("pending", "delayed", "in flight", "dead")


class Sample(NamedTuple):
    """The queues as they were counted at a moment."""

    at: float  # monotonic
    queues: Sequence[QueueStats]


class Rates(NamedTuple):
    """Runs of a queue's tasks, per second."""

    done: float
    failed: float


def show(inspector: Inspector, *, as_json: bool, watch: bool) -> None:
    """Write to stdout what is there now, or with `watch` refresh it each second until Ctrl-C.

    Raises:
        WakaQError: There is no terminal to refresh.
    """
    console = Console(highlight=False, markup=False)
    if as_json:
        sys.stdout.write(json.dumps(inspector.snapshot().to_dict(), indent=2) + "\n")
    elif not watch:
        console.print(tables(inspector.snapshot(), {}))
    elif not console.is_terminal:
        raise WakaQError("--watch needs a terminal; for programs there is --json")
    else:
        try:
            _refresh(inspector, console)
        except KeyboardInterrupt:
            return


def _refresh(inspector: Inspector, console: Console) -> None:
    history: deque[Sample] = deque(maxlen=_HISTORY)
    frame = Group()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            news = ""
            try:
                snapshot = inspector.snapshot()
            except RedisError as error:
                if not is_outage(error):
                    raise
                news = f"Redis is away, trying again: {error}"
            else:
                history.append(Sample(time.monotonic(), snapshot.queues))
                lines = sparklines(history, console.width - _SPARKLINE_LABEL)
                frame = Group(*lines, "", tables(snapshot, rates(history)))
            live.update(Group(news, frame), refresh=True)
            time.sleep(_REFRESH)


def rates(history: Sequence[Sample]) -> dict[str, Rates]:
    """Return each queue's rates since the last refresh, by its name; nothing before two of them."""
    if len(history) < 2:  # noqa: PLR2004 - a rate is between two moments
        return {}
    before, after = history[-2], history[-1]
    seconds = after.at - before.at
    return {
        new.name: Rates((new.done - old.done) / seconds, (new.failed - old.failed) / seconds)
        for old, new in zip(before.queues, after.queues, strict=True)
    }


def sparklines(history: Sequence[Sample], width: int) -> Iterator[Text]:
    """Return a line of throughput and a line of backlog, of all queues together."""
    pending = [sum(queue.pending for queue in sample.queues) for sample in history]
    done = [(sample.at, sum(queue.done for queue in sample.queues)) for sample in history]
    per_second = [(new - old) / (end - begin) for (begin, old), (end, new) in pairwise(done)]
    yield _sparkline("done/s", per_second, width)
    yield _sparkline("pending", pending, width)


def _sparkline(name: str, values: Sequence[float], width: int) -> Text:
    top = max(values[-width:], default=0) or 1
    highest = len(_BARS) - 1
    bars = (_BARS[min(highest, int(value / top * len(_BARS)))] for value in values[-width:])
    now = f"{values[-1]:,.0f}" if values else "-"
    return Text(f"{name:8}{now:>12}  {''.join(bars)}", no_wrap=True)


def tables(snapshot: Snapshot, per_second: Mapping[str, Rates]) -> Group:
    """Return queues and workers as they fit 80 columns; totals where there are no rates."""
    queues = Table("queue", box=None, pad_edge=False)
    unit = "/s" if per_second else ""
    for column in ("priority", *_COUNTS, f"done{unit}", f"failed{unit}"):
        queues.add_column(column, justify="right")
    for queue in snapshot.queues:
        priority = "" if queue.priority is None else str(queue.priority)
        numbers = (
            *(queue.pending, queue.delayed, queue.inflight, queue.dead_letters),
            *per_second.get(queue.name, (queue.done, queue.failed)),
        )
        queues.add_row(queue.name, priority, *(f"{number:,.0f}" for number in numbers))
    workers = Table("host", box=None, pad_edge=False)
    for column in ("pid", "worker", "runs", "for", "MB"):
        workers.add_column(column, justify="left" if column == "runs" else "right")
    for supervisor in snapshot.supervisors:
        for worker in supervisor.workers:
            workers.add_row(_shortened(supervisor.host), *_cells(worker))
    return Group(queues, "", workers, f"{len(snapshot.supervisors)} x wakaq-worker")


def _cells(worker: WorkerInfo) -> Iterator[str | Text]:
    """Return a worker's row, but for its host."""
    what, seconds = "idle", None
    if worker.tasks:
        what, seconds = worker.tasks[0].name, worker.tasks[0].seconds
    if len(worker.tasks) > 1:
        what = f"{len(worker.tasks)} tasks, such as {what}"
    if worker.is_silent:
        what = f"does not answer: {what}"
    yield str(worker.pid)
    yield str(worker.slot)
    yield _shortened(what)
    yield "" if seconds is None else f"{seconds:,.0f} s"
    yield f"{worker.rss / 1e6:,.0f}"


def _shortened(text: str) -> Text:
    # The text is told to be cut, not its column, so that the column gives way to the others.
    return Text(text, no_wrap=True, overflow="ellipsis")
