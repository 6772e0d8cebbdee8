"""Renders the results.

Markdown tables, and a chart as SVG, both made from `results/results.json` alone.

The page of the documentation includes them. It measures nothing.
"""

import json
import statistics
from collections.abc import Iterator
from typing import Any
from xml.sax.saxutils import escape

from benchmarks import targets
from benchmarks.session import HERE, PEERS

RESULTS = HERE / "results"
# Figure, heading, decimals.
Columns = list[tuple[str, str, int]]
TABLE: Columns = [
    ("enqueue", "enqueue/s", 0),
    ("bulk", "in batches", 0),
    ("drain", "drain/s", 0),
    ("drain_1kb", "drain/s, 1 KB", 0),
    ("worker_cpu", "worker CPU s per 1,000", 4),
    ("redis_cpu", "Redis CPU s per 1,000", 4),
    ("commands", "Redis commands a task", 2),
    ("reads", "requests", 2),
    ("pick_up_p50", "pick-up p50 ms", 2),
    ("pick_up_p99", "p99 ms", 2),
    ("pss", "idle PSS MB", 0),
    ("connections", "connections", 0),
]
ASYNC: Columns = [("async", "tasks/s", 0), ("async_share", "share of ideal", 3)]
DELAYED: Columns = [
    ("late_p50", "single: p50 late, ms", 0),
    ("late_p99", "p99 late, ms", 0),
    ("late_min", "earliest, ms", 0),
    ("burst", "due at once", 0),
    ("burst_p50", "p50 late, ms", 0),
    ("burst_p99", "p99 late, ms", 0),
]
BAR, WIDTH = 22, 720


def load() -> dict[str, Any]:
    """Return the results so far."""
    path = RESULTS / "results.json"
    return json.loads(path.read_text()) if path.exists() else {}


def save(results: dict[str, Any]) -> None:
    """Write the results, and the tables and the chart made of them."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "tables.md").write_text(markdown(results))
    if "table" in results:
        (RESULTS / "chart.svg").write_text(chart(_medians(results["table"])))


def _medians(figures: dict[str, dict[str, list[float]]]) -> targets.Medians:
    return {
        name: {figure: statistics.median(values) for figure, values in rounds.items()}
        for name, rounds in figures.items()
    }


def _cell(values: list[float] | None, decimals: int) -> str:
    """Return the median, and how far the rounds lay from it at most, in percent."""
    if not values:
        return ""
    middle = statistics.median(values)
    spread = max(abs(value - middle) for value in values)
    percent = f" ±{spread / abs(middle) * 100:.0f}%" if middle and spread else ""
    return f"{middle:,.{decimals}f}{percent}"


def _table(figures: dict[str, dict[str, list[float]]], columns: Columns) -> Iterator[str]:
    yield f"| | {' | '.join(heading for _, heading, _ in columns)} |"
    yield "|---|" + "---:|" * len(columns)
    for name in (name for name in PEERS if name in figures):
        cells = (_cell(figures[name].get(figure), decimals) for figure, _, decimals in columns)
        yield f"| {name} | {' | '.join(cells)} |"


def _checks(results: dict[str, Any]) -> Iterator[str]:
    checks = [targets.Check(*check) for check in results.get("targets", [])]
    parts = [_medians(results.get(part, {})) for part in ("table", "async", "delayed")]
    if all("wakaq" in part for part in parts):
        checks = [*targets.from_results(*parts), *checks]
    if checks:
        yield "| | figure | to reach | |"
        yield "|---|---:|---:|---|"
    for check in checks:
        sign, verdict = "≥" if check.is_minimum else "≤", "yes" if check.is_reached else "**no**"
        yield f"| {check.what} | {check.value:,.3f} | {sign} {check.limit:,.3f} | {verdict} |"


def _recovery(rows: dict[str, list[float]]) -> Iterator[str]:
    yield "| | s until the first task runs |"
    yield "|---|---:|"
    for what, values in rows.items():
        yield f"| {what} | {_cell(values, 2)} |"


def markdown(results: dict[str, Any]) -> str:
    """Return all tables."""
    lines = []
    if "machine" in results:
        lines += [", ".join(f"{key}: {value}" for key, value in results["machine"].items()), ""]
    for part, heading, columns in (
        ("table", "All queues", TABLE),
        ("async", "2,000 async sleeps of 0.1 s, 100 at once in each of 2 processes", ASYNC),
        ("delayed", "Delayed tasks", DELAYED),
    ):
        if part in results:
            lines += [*_heading(heading, results["taken"][part]), *_table(results[part], columns)]
    if checks := list(_checks(results)):
        lines += ["", "## What WakaQ has to reach", "", *checks]
    if "recovery" in results:
        lines += [
            *_heading("Recovery", results["taken"]["recovery"]),
            *_recovery(results["recovery"]),
        ]
    return "\n".join([*lines, ""])


def _heading(text: str, taken: dict[str, Any]) -> list[str]:
    size = "" if taken["scale"] == 1 else ", with a part of the work only"
    return ["", f"## {text}", "", f"{taken['date']}, rounds: {taken['rounds']}{size}.", ""]


def chart(medians: targets.Medians) -> str:
    """Return the drain rates as horizontal bars, the longest first."""
    rows = sorted(medians.items(), key=lambda row: -row[1]["drain"])
    most = rows[0][1]["drain"]
    bars = []
    for number, (name, figures) in enumerate(rows):
        top, length = 34 + number * BAR, figures["drain"] / most * (WIDTH - 260)
        color = "#2f7d5b" if name == "wakaq" else "#c9c9c9" if "floor" in name else "#7b93b0"
        bars.append(
            f'<text x="150" y="{top + 13}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="158" y="{top}" width="{max(length, 1):.1f}"'
            f' height="{BAR - 6}" fill="{color}"/>'
            f'<text x="{164 + length:.1f}" y="{top + 13}">{figures["drain"]:,.0f}</text>'
        )
    height = 44 + len(rows) * BAR
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'font-family="system-ui, sans-serif" font-size="13" fill="#555">\n'
        "<title>No-op tasks drained a second, 2 worker processes</title>\n"
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>\n'
        '<text x="158" y="20" font-weight="bold">No-op tasks a second, 2 worker processes</text>\n'
        + "\n".join(bars)
        + "\n</svg>\n"
    )
