"""One process's connections to Redis, as redis-py makes them. Not for what is said over them: that is `broker`.

The only module that imports redis.
"""

import asyncio
import contextlib
import functools
import logging
import os
import random
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from importlib import resources
from typing import Any

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.commands.core import Script
from redis.connection import Connection
from redis.retry import Retry

from wakaq.errors import ConfigError
from wakaq.settings import Settings

__all__ = [
    "LONGEST_BACKOFF",
    "OUTAGES",
    "Client",
    "Connection",
    "RedisError",
    "ResponseError",
    "backoff",
    "freshen",
    "source",
]

# Redis is away, or is there and cannot serve now: it heals without us, and nothing is to be given up meanwhile.
OUTAGES = (
    redis.ConnectionError,
    redis.TimeoutError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.OutOfMemoryError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.TryAgainError,
    redis.exceptions.MasterDownError,
)
_REFUSALS = {
    "-READONLY ": redis.exceptions.ReadOnlyError,
    "-OOM ": redis.exceptions.OutOfMemoryError,
}
RedisError = redis.RedisError
LONGEST_BACKOFF = 1.5  # seconds; work is to go on within two once Redis is back
MOST_CONNECTIONS = 16  # of one event loop
ResponseError = redis.ResponseError
COMPLAIN_EVERY = 60.0  # seconds between two logs of one error
MOST_COMPLAINTS = 1_000

logger = logging.getLogger("wakaq.broker")


class Client:
    """Connections, and scripts; safe to use from several threads, and after a fork.

    Connects on first use. Raises redis-py's own errors: at once where the connection is refused, within `socket_timeout`
    where nothing answers.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.client: redis.Redis = _connect(redis.Redis, Retry(NoBackoff(), 0), settings)
        # Event loop -> its own client, the gate to its connections, and what closes it with the loop.
        self._async_clients: dict[Any, tuple[Any, asyncio.Semaphore, Any]] = {}
        self._local = threading.local()
        self._scripts: dict[str, Script] = {}
        self._complaints: dict[str, float] = {}  # error -> when to log it again

    @contextlib.asynccontextmanager
    async def async_client(self) -> AsyncGenerator[Any, None]:
        """Lend the running event loop's client, for one call: thousands at once share a few connections."""
        loop = asyncio.get_running_loop()
        if loop not in self._async_clients:
            for other in list(self._async_clients):
                if other.is_closed():
                    self._async_clients.pop(other, None)
            retry = AsyncRetry(NoBackoff(), 0)
            client = _connect(redis.asyncio.Redis, retry, self.settings)
            keeper = _close_with_loop(client)
            gate = asyncio.Semaphore(MOST_CONNECTIONS)
            self._async_clients[loop] = client, gate, keeper
            await anext(keeper)
        client, gate, _ = self._async_clients[loop]
        async with gate:
            yield client

    def connection(self) -> Connection:
        """Return a connection outside the pool, not connected yet."""
        pool = self.client.connection_pool
        connection: Connection = pool.connection_class(**pool.connection_kwargs)
        return connection

    def exchange(self, command: bytes) -> Any:
        """Send a packed command on this thread's own connection, without the pool's locks; returns the reply."""
        connection = getattr(self._local, "connection", None)
        if connection is None or self._local.pid != os.getpid():
            connection = self.connection()
            self._local.connection, self._local.pid = connection, os.getpid()
        freshen(connection)
        try:
            connection.send_packed_command((command,))
            return connection.read_response()
        except redis.ResponseError:
            raise
        except BaseException:
            # Also a SoftTimeout between command and reply: the next command must not read this one's reply.
            connection.disconnect()
            raise

    def run_script(self, name: str, keys: Sequence[str], args: Sequence[object]) -> Any:
        """Call a script, packed by us: a client's way there costs more than all the rest."""
        command = _pack("EVALSHA", self.script(name).sha, len(keys), *keys, *args)
        try:
            return self.exchange(command)
        except redis.exceptions.NoScriptError:
            # A new server, or SCRIPT FLUSH: nothing was executed.
            self.client.script_load(source(name))
            return self.exchange(command)
        except redis.ResponseError as error:
            # Redis 6.2 wraps what a command in a script was refused for.
            for mark, kind in _REFUSALS.items():
                if mark in str(error):
                    raise kind(str(error)) from error
            raise

    def complain(self, error: str) -> None:
        """Log what Redis refuses, such as a key of a wrong type: not with every call that meets it."""
        now = time.monotonic()
        if now >= self._complaints.get(error, 0.0):
            if len(self._complaints) > MOST_COMPLAINTS:
                self._complaints.clear()
            self._complaints[error] = now + COMPLAIN_EVERY
            logger.error("Redis refuses: %s", error)

    def script(self, name: str) -> Script:
        script = self._scripts.get(name)
        if script is None:
            script = self._scripts[name] = self.client.register_script(source(name))
        return script

    def ping(self) -> None:
        self.client.ping()

    def close(self) -> None:
        """Close the connections, of other threads all but those that `exchange` made: these end with their threads."""
        self.client.close()
        if (connection := getattr(self._local, "connection", None)) is not None:
            connection.disconnect()


def _pack(*arguments: object) -> bytes:
    """Return a command as the server reads it."""
    parts = [b"*%d\r\n" % len(arguments)]
    for argument in arguments:
        data = argument if isinstance(argument, bytes) else str(argument).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(parts)


def freshen(connection: Any) -> None:
    """Find out that the server closed a connection while it lay idle, before anything is sent on it.

    Later, nobody could tell whether the command was executed.
    """
    try:
        if connection.can_read():
            connection.disconnect()
    except redis.ConnectionError:
        connection.disconnect()


async def _close_with_loop(client: Any) -> AsyncGenerator[None, None]:
    """Close a client when its event loop ends, which closes the generators that were begun on it."""
    try:
        yield
    finally:
        await client.aclose()


def backoff(failures: int) -> float:
    """Return how long to wait after so many failures in a row: doubling, with jitter so that a fleet spreads out."""
    longest = min(0.05 * 2.0 ** min(failures, 10), LONGEST_BACKOFF)
    return random.uniform(0.5, 1.0) * longest  # noqa: S311 - no secret


@functools.cache
def source(name: str) -> str:
    """Return the text of a script."""
    return (resources.files("wakaq") / "lua" / f"{name}.lua").read_text("utf-8")


def _connect(kind: Any, retry: Any, settings: Settings) -> Any:
    """Make a client, sync or async, that repeats nothing by itself."""
    options: dict[str, Any] = {
        "socket_timeout": settings.socket_timeout,
        "socket_connect_timeout": settings.socket_connect_timeout,
        "health_check_interval": settings.health_check_interval,
        "retry": retry,
        "protocol": 2,
        "max_connections": 2**20,  # as many as the application has threads
    }
    if settings.url is None:
        names = ("host", "port", "username", "password", "db")
        return kind(**options, **{name: getattr(settings, name) for name in names})
    if settings.url.startswith("unix:"):
        del options["socket_connect_timeout"]
    try:
        return kind.from_url(settings.url, **options)
    except ValueError as error:
        raise ConfigError(f"url cannot be used: {error}") from error
