"""No queue at all: bare loops on Redis, which lose what they hold when they die.

Variants `blpop` and `lpop100`.

What they do is what every queue must do at least: fetch, decode, call.
"""

import json
import sys
from collections.abc import Iterable
from datetime import datetime
from itertools import islice
from typing import Any

from peers.common import HOST, PORT, PROCESSES, VARIANT, work
from redis import Redis

QUEUE = b"work"
BATCH = 100
COMMANDS = [[sys.executable, "-m", "peers.floor"]] * int(PROCESSES)
KEYS = ["work"]

client = Redis(host=HOST, port=PORT)
_connections: list[Any] = []


def _payload(args: tuple[Any, ...]) -> bytes:
    return b'{"name": "work", "args": %b, "kwargs": {}}' % json.dumps(args).encode()


def send(args: tuple[Any, ...], _eta: datetime | None) -> None:
    """Enqueue one call.

    By redis-py's own `rpush`, as who has no queue would, or as a packed RPUSH on one connection.
    """
    if VARIANT == "blpop":
        client.rpush(QUEUE, _payload(args))
        return
    if not _connections:
        _connections.append(client.connection_pool.get_connection())
    payload = _payload(args)
    command = b"*3\r\n$5\r\nRPUSH\r\n$4\r\nwork\r\n$%d\r\n%b\r\n" % (len(payload), payload)
    _connections[0].send_packed_command([command])
    _connections[0].read_response()


def bulk(calls: Iterable[tuple[Any, ...]]) -> None:
    """Enqueue many calls, a pipeline of RPUSHes at a time."""
    rest = iter(calls)
    while batch := list(islice(rest, BATCH)):
        pipeline = client.pipeline(transaction=False)
        for args in batch:
            pipeline.rpush(QUEUE, _payload(args))
        pipeline.execute()


def _run(payload: bytes) -> None:
    message = json.loads(payload)
    work(*message["args"], **message["kwargs"])


def _run_one_by_one() -> None:
    while True:
        reply = client.blpop([QUEUE], timeout=1)
        if reply:
            _run(reply[1])


def _run_many() -> None:
    while True:
        if payloads := client.lpop(QUEUE, BATCH):
            for payload in payloads:
                _run(payload)
        elif reply := client.blpop([QUEUE], timeout=1):
            _run(reply[1])


if __name__ == "__main__":
    _run_many() if VARIANT == "lpop100" else _run_one_by_one()
