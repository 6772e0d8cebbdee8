"""One process's connections to Redis, as redis-py makes them. Not for what is said over them: that is `broker`.

The only module that imports redis.
"""

import asyncio
import contextlib
import functools
import hashlib
import logging
import os
import random
import select
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from importlib import resources
from typing import Any, NoReturn

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, OutOfMemoryError, ReadOnlyError
from redis.retry import Retry

from wakaq.errors import ConfigError
from wakaq.settings import Settings

# Redis is away, or is there and cannot serve now: it heals without us, and nothing is to be given up meanwhile.
OUTAGES = (
    redis.ConnectionError,
    redis.TimeoutError,
    ReadOnlyError,
    OutOfMemoryError,
    redis.exceptions.MasterDownError,
)
# Refusals that redis-py does not tell from others: a failover, a full disk, a replica that is away, a long script.
_PASSING = {"UNBLOCKED", "MISCONF", "NOREPLICAS", "BUSY"}
RedisError = redis.RedisError
ResponseError = redis.ResponseError

LONGEST_BACKOFF = 1.5  # seconds; work is to go on within two once Redis is back
MOST_CONNECTIONS = 16  # of one event loop
COMPLAIN_EVERY = 60.0  # seconds between two logs of one error
MOST_COMPLAINTS = 1_000
CHUNK = 1 << 16
CLOSED = "the server closed the connection"

logger = logging.getLogger("wakaq.broker")


class Wire:
    """A connection for the few hot commands, which are packed and read here: redis-py would take longer than all the rest.

    For one thread at a time. redis-py connects it, with TLS and authentication, and names the errors.
    """

    def __init__(self, client: Any) -> None:
        pool = client.connection_pool
        self._connection: Any = pool.connection_class(**pool.connection_kwargs)
        self._poll = select.poll()
        self._used_at = 0.0
        self.is_owed = False  # whether a reply is still to come, also after an exception anywhere

    @property
    def sock(self) -> Any:
        """Its socket, None while it is not connected."""
        return self._connection._sock  # noqa: SLF001 - there is no other way to it

    def send(self, command: bytes) -> None:
        """Send a packed command, on a new connection if this one is gone: later, nobody could tell what was executed."""
        connection, now = self._connection, time.monotonic()
        try:
            # The next command must not read the reply to one that a SoftTimeout, say, interrupted.
            was_owed, self.is_owed = self.is_owed, True
            if connection._sock is not None and (was_owed or self._is_gone(now)):  # noqa: SLF001
                self.close()
            if connection._sock is None:  # noqa: SLF001
                connection.connect()
                self._poll.register(self.sock, select.POLLIN)
            self._used_at = now
            connection._sock.sendall(command)  # noqa: SLF001
        except OSError as error:
            self._fail(error)

    def _is_gone(self, now: float) -> bool:
        """Whether the server closed the connection, or does not answer after a long time in which nothing was sent."""
        if self._poll.poll(0):
            return True
        if now - self._used_at > self._connection.health_check_interval > 0:
            try:
                self._connection.check_health()
            except (redis.ConnectionError, redis.TimeoutError):
                return True
        return False

    def receive(self) -> Any:
        """Return the reply: an int, bytes, or None.

        Raises:
            redis.ResponseError: The server refused the command.
        """
        try:
            reply = self._more()
            while b"\r\n" not in reply:
                reply += self._more()
            line, _, rest = reply.partition(b"\r\n")
            if line[:1] == b"$" and line != b"$-1":
                size = int(line[1:])
                reply = rest[:size] if len(rest) >= size + 2 else self._rest(rest, size)
        except OSError as error:
            self._fail(error)
        self.is_owed = False
        if line[:1] == b"$" and line != b"$-1":
            return reply
        if line[:1] == b"-":
            text = line[1:].decode(errors="replace")
            if text.split(" ", 1)[0] in _PASSING:
                raise redis.ConnectionError(text)
            raise self._connection._parser.parse_error(text)  # noqa: SLF001
        return int(line[1:]) if line[:1] == b":" else None

    def call(self, command: bytes) -> Any:
        """Send a packed command; return the reply."""
        self.send(command)
        return self.receive()

    def close(self) -> None:
        self._poll = select.poll()
        self._connection.disconnect()

    def _rest(self, start: bytes, size: int) -> bytes:
        """Return a long reply, which goes on behind this start."""
        buffer = bytearray(size + 2)
        buffer[: len(start)] = start
        view, position = memoryview(buffer), len(start)
        while position < len(buffer):
            got = self.sock.recv_into(view[position:])
            if not got:
                raise ConnectionResetError(CLOSED)
            position += got
        return bytes(view[:size])

    def _more(self) -> bytes:
        part: bytes = self._connection._sock.recv(CHUNK)  # noqa: SLF001
        if not part:
            raise ConnectionResetError(CLOSED)
        return part

    def _fail(self, error: OSError) -> NoReturn:
        self.close()
        if isinstance(error, TimeoutError):
            raise redis.TimeoutError(f"no answer from Redis: {error}") from error
        raise redis.ConnectionError(str(error)) from error


class Client:
    """Connections, and scripts; safe to use from several threads, and after a fork.

    Connects on first use. Raises redis-py's own errors: at once where the connection is refused, within `socket_timeout`
    where nothing answers.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.client: Any = _connect(redis.Redis, Retry(NoBackoff(), 0), settings)
        # Event loop -> its own client, the gate to its connections, and what closes it with the loop.
        self._async_clients: dict[Any, tuple[Any, asyncio.Semaphore, Any]] = {}
        self._local = threading.local()
        self._complaints: dict[str, float] = {}  # error -> when to log it again
        self.refusals = 0  # how many there were

    @contextlib.asynccontextmanager
    async def async_client(self) -> AsyncGenerator[Any, None]:
        """Lend the running event loop's client, for one call: thousands at once share a few connections."""
        loop = asyncio.get_running_loop()
        if loop not in self._async_clients:
            for other in list(self._async_clients):
                if other.is_closed():
                    self._async_clients.pop(other, None)
            client = _connect(redis.asyncio.Redis, AsyncRetry(NoBackoff(), 0), self.settings)
            keeper = _close_with_loop(client)
            gate = asyncio.Semaphore(MOST_CONNECTIONS)
            self._async_clients[loop] = client, gate, keeper
            await anext(keeper)
        client, gate, _ = self._async_clients[loop]
        async with gate:
            yield client

    def wire(self) -> Wire:
        """Return this thread's own wire."""
        local = self._local
        # One that is owed a reply is in use by what a signal handler interrupted, or was left by a SoftTimeout.
        if getattr(local, "pid", None) != os.getpid() or local.wire.is_owed:
            local.wire, local.pid = Wire(self.client), os.getpid()
        return local.wire  # type: ignore[no-any-return]

    def run_script(self, name: str, keys: Sequence[str], args: Sequence[object]) -> Any:
        """Call a script, on this thread's wire; it returns an int, a string or nil."""
        source, sha = script(name)
        wire = self.wire()
        command = pack("EVALSHA", sha, len(keys), *keys, *args)
        try:
            return wire.call(command)
        except NoScriptError:
            # A new server, or SCRIPT FLUSH: nothing was executed.
            wire.call(pack("SCRIPT", "LOAD", source))
            return wire.call(command)
        except redis.ResponseError as error:
            # Redis 6.2 wraps what a command in a script was refused for.
            for mark, kind in (("-READONLY ", ReadOnlyError), ("-OOM ", OutOfMemoryError)):
                if mark in str(error):
                    raise kind(str(error)) from error
            raise

    def complain(self, error: str) -> None:
        """Log what Redis refuses, such as a key of a wrong type: not with every call that meets it."""
        self.refusals += 1
        now = time.monotonic()
        if now >= self._complaints.get(error, 0.0):
            if len(self._complaints) > MOST_COMPLAINTS:
                self._complaints.clear()
            self._complaints[error] = now + COMPLAIN_EVERY
            logger.error("Redis refuses: %s", error)

    def ping(self) -> None:
        self.client.ping()

    def close(self) -> None:
        """Close the connections; other threads' wires end with their threads."""
        self.client.close()
        if (wire := getattr(self._local, "wire", None)) is not None:
            wire.close()


def pack(*arguments: object) -> bytes:
    """Return a command as the server reads it."""
    parts = [b"*%d\r\n" % len(arguments)]
    for argument in arguments:
        data = argument if isinstance(argument, bytes) else str(argument).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(parts)


def backoff(failures: int) -> float:
    """Return how long to wait after so many failures in a row: doubling, with jitter so that a fleet spreads out."""
    longest = min(0.05 * 2.0 ** min(failures, 10), LONGEST_BACKOFF)
    return random.uniform(0.5, 1.0) * longest  # noqa: S311 - no secret


@functools.cache
def script(name: str) -> tuple[bytes, str]:
    """Return the text of a script, and how the server names it."""
    text = (resources.files("wakaq") / "lua" / f"{name}.lua").read_bytes()
    return text, hashlib.sha1(text, usedforsecurity=False).hexdigest()


async def _close_with_loop(client: Any) -> AsyncGenerator[None, None]:
    """Close a client when its event loop ends, which closes the generators that were begun on it."""
    try:
        yield
    finally:
        await client.aclose()


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
