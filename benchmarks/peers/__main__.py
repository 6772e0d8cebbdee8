"""The command line of every peer.

`python -m peers NAME describe`, or `enqueue` with a JSON object, or `sleep`.
"""

import asyncio
import importlib
import inspect
import json
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from types import ModuleType
from typing import Any


def _calls(spec: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """Yield each task's arguments.

    Its number alone, unless the task is to sleep or to carry a text.
    """
    seconds, text = spec.get("seconds", 0), "x" * spec.get("size", 0)
    extra = (seconds, text) if text else (seconds,) if seconds else ()
    first = spec.get("first", 0)
    return ((number, *extra) for number in range(first, first + spec["tasks"]))


def _due(spec: dict[str, Any]) -> datetime | None:
    """Return the moment a task is to run, or None for at once."""
    if "at" in spec:
        return datetime.fromtimestamp(spec["at"], UTC)
    return datetime.now(UTC) + timedelta(seconds=spec["delay"]) if "delay" in spec else None


def _pace(spec: dict[str, Any], started: float, done: int) -> float:
    return started + done * spec["every"] - time.monotonic() if "every" in spec else 0


async def _enqueue_async(module: ModuleType, spec: dict[str, Any]) -> list[float]:
    sent = []
    started = time.monotonic()
    for args in _calls(spec):
        if (wait := _pace(spec, started, len(sent))) > 0:
            await asyncio.sleep(wait)
        sent.append(time.monotonic())
        await module.send(args, _due(spec))
    return [*sent, time.monotonic()]


def _enqueue(module: ModuleType, spec: dict[str, Any]) -> list[float]:
    sent = []
    started = time.monotonic()
    for args in _calls(spec):
        if (wait := _pace(spec, started, len(sent))) > 0:
            time.sleep(wait)
        sent.append(time.monotonic())
        module.send(args, _due(spec))
    return [*sent, time.monotonic()]


def enqueue(module: ModuleType, spec: dict[str, Any]) -> dict[str, Any]:
    """Enqueue as told; return how long it took and, of a paced run, when each call began."""
    if spec.get("bulk"):
        started = time.monotonic()
        module.bulk(_calls(spec))
        return {"rate": spec["tasks"] / (time.monotonic() - started)}
    if inspect.iscoroutinefunction(module.send):
        sent = asyncio.run(_enqueue_async(module, spec))
    else:
        sent = _enqueue(module, spec)
    paced = {"sent": sent[:-1]} if "every" in spec or "at" in spec else {}
    # The first call also connects: it is not counted.
    return {"rate": (len(sent) - 2) / (sent[-1] - sent[1]), **paced} if len(sent) > 2 else paced


def sleep(spec: dict[str, Any]) -> dict[str, Any]:
    """Run the sleeping task in a bare loop: what one worker could do with no queue at all."""
    work = importlib.import_module("peers.common").work
    started = time.monotonic()
    for args in _calls(spec):
        work(*args)
    return {"seconds": time.monotonic() - started}


def main() -> None:
    """Do what the command line says and print the answer as JSON."""
    name, action, *rest = sys.argv[1:]
    if action == "sleep":
        answer = sleep(json.loads(rest[0]))
    else:
        module = importlib.import_module(f"peers.{name}")
        if action == "enqueue":
            answer = enqueue(module, json.loads(rest[0]))
        else:
            schedulers = getattr(module, "SCHEDULERS", [])
            answer = {"workers": module.COMMANDS, "keys": module.KEYS, "schedulers": schedulers}
    print(json.dumps(answer))


main()
