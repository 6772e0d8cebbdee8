"""The command line: `python -m benchmarks table|async|delayed|targets|recovery|all|report`.

Every part merges what it measured into `results/results.json` and renders the page's tables and
chart from all of it.
"""

import argparse
import json
import sys
from datetime import UTC, datetime
from typing import Any

from benchmarks import asynchronous, delayed, machine, recovery, report, table, targets
from benchmarks.session import PEERS


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parts = ["table", "async", "delayed", "targets", "recovery", "all", "report"]
    parser.add_argument("part", choices=parts)
    parser.add_argument("--only", help="peers, or parts of targets, separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a fifth of the work, one round")
    parser.add_argument("--print", action="store_true", help="print and do not write the results")
    return parser.parse_args()


def _measure(part: str, only: list[str], rounds: int, scale: float) -> Any:
    match part:
        case "table":
            return table.measure(only or list(PEERS), rounds, scale)
        case "async":
            return asynchronous.measure(only or list(asynchronous.NAMES), rounds)
        case "delayed":
            names = [peer.name for peer in PEERS.values() if peer.has_delay]
            return delayed.measure(only or names, rounds, scale)
        case "targets":
            return [check for name in only or targets.PARTS for check in targets.PARTS[name](scale)]
        case _:
            return recovery.measure(rounds)


def main() -> None:
    """Measure what was asked for, write it down, print it as Markdown."""
    asked = _arguments()
    scale, rounds = (0.2, 1) if asked.quick else (1.0, asked.rounds)
    only = asked.only.split(",") if asked.only else []
    parts = (
        ["table", "async", "delayed", "targets", "recovery"]
        if asked.part == "all"
        else [asked.part]
    )
    results: dict[str, Any] = {} if asked.print else report.load()
    for part in parts:
        if part != "report":
            measured = json.loads(json.dumps(_measure(part, only, rounds, scale)))
            if only and isinstance(measured, dict):  # the other peers' figures stay
                measured = {**results.get(part, {}), **measured}
            results[part] = measured
            taken = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "rounds": rounds, "scale": scale}
            results.setdefault("taken", {})[part] = taken
            results["machine"] = machine.describe()
    sys.stdout.write(report.markdown(results))
    if not asked.print:
        report.save(results)


main()
