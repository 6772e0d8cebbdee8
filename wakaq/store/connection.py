"""One process's connections to Redis, and what its errors mean.

Not for what is said: that is `broker`.

The only module that imports redis, and only by its public interface.
"""

import asyncio
import contextlib
import functools
import hashlib
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
from redis.retry import Retry

from wakaq.errors import ConfigError
from wakaq.settings import Settings

RedisError = redis.RedisError
ResponseError = redis.ResponseError

# Refusals of a server that is there and cannot serve now. It heals without us, so nothing is given
# up meanwhile.
_PASSING = (
    "BUSY",
    "CLUSTERDOWN",
    "LOADING",
    "MASTERDOWN",
    "MISCONF",
    "NOREPLICAS",
    "OOM",
    "READONLY",
    "TRYAGAIN",
    "UNBLOCKED",
)
LONGEST_BACKOFF = 1.5  # seconds; work is to go on within two once Redis is back
MOST_ASYNC_CONNECTIONS = 16  # of one event loop
REPORT_EVERY = 60.0  # seconds between two logs of one refusal
MOST_REFUSALS = 1_000  # remembered

logger = logging.getLogger("wakaq.store")


def is_outage(error: BaseException) -> bool:
    """Tell whether Redis is away, or cannot serve for now.

    Else it refuses this call for what it is.
    """
    if isinstance(error, redis.AuthenticationError | redis.exceptions.AuthorizationError):
        return False
    if isinstance(error, redis.ConnectionError | redis.TimeoutError):
        return True
    if isinstance(error, redis.exceptions.ReadOnlyError | redis.exceptions.OutOfMemoryError):
        return True
    # redis-py knows some of them as types, and removes the word; others it leaves in the text, and
    # Redis 6.2 puts it behind the name of the script that was refused.
    if isinstance(error, redis.exceptions.ClusterDownError | redis.exceptions.TryAgainError):
        return True
    if not isinstance(error, redis.ResponseError):
        return False
    words = str(error).replace("-", " ").split()
    return any(word in _PASSING for word in words[:1]) or any(
        f"-{word} " in str(error) for word in _PASSING
    )


class Connection:
    """A connection for one thread at a time, which connects when it is first used.

    What was sent is never sent again by itself: whether a command may be repeated is known only to
    its caller.
    """

    def __init__(self, pool: Any) -> None:
        self._connection: Any = pool.connection_class(**pool.connection_kwargs)
        self._is_open = False  # an earlier call was answered
        # Whether a reply is still to come. A SoftTimeout, say, may end a call between a command and
        # its reply, which the next command must not read.
        self.is_owed = False

    def call(self, command: bytes) -> Any:
        """Send a packed command; return the reply.

        Raises:
            redis.RedisError: Redis is away, or refuses.
        """
        if self.is_owed or (self._is_open and self._is_gone()):
            self._connection.disconnect()
        self._is_open, self.is_owed = False, True
        self._connection.send_packed_command([command], check_health=False)
        try:
            reply = self._connection.read_response()
        except redis.ResponseError as error:
            self.is_owed = False
            # Where it cannot serve, another server may be the primary by now: a new connection
            # leads there.
            if is_outage(error):
                self._connection.disconnect()
            else:
                self._is_open = True
            raise
        self._is_open, self.is_owed = True, False
        return reply

    def _is_gone(self) -> bool:
        """Whether the server closed the connection, or does not answer after a long pause.

        Now it can be replaced; once a command was sent, nobody could tell whether it was executed.
        """
        try:
            if self._connection.can_read():
                return True
            self._connection.check_health()
        except (redis.ConnectionError, redis.TimeoutError):
            return True
        return False

    def close(self) -> None:
        """Close it; the next call connects anew."""
        self._connection.disconnect()
        self._is_open = False


class Client:
    """Connections, and scripts; safe to use from several threads, and after a fork.

    Connects on first use. Raises redis-py's own errors: at once where the connection is refused,
    within `socket_timeout` where nothing answers.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.client: Any = _connect(redis.Redis, Retry(NoBackoff(), 0), settings)
        # Event loop -> its own client, the gate to its connections, and what closes it with the
        # loop.
        self._async_clients: dict[Any, tuple[Any, asyncio.Semaphore, Any]] = {}
        self._local = threading.local()
        self._reported: dict[str, float] = {}  # refusal -> when to log it again

    @contextlib.asynccontextmanager
    async def async_client(self) -> AsyncGenerator[Any, None]:
        """Lend the running event loop's client for one call; thousands share a few connections."""
        loop = asyncio.get_running_loop()
        if loop not in self._async_clients:
            for other in list(self._async_clients):
                if other.is_closed():
                    self._async_clients.pop(other, None)
            client = _connect(redis.asyncio.Redis, AsyncRetry(NoBackoff(), 0), self.settings)
            keeper = _close_with_loop(client)
            gate = asyncio.Semaphore(MOST_ASYNC_CONNECTIONS)
            self._async_clients[loop] = client, gate, keeper
            await anext(keeper)
        client, gate, _ = self._async_clients[loop]
        async with gate:
            yield client

    def connection(self) -> Connection:
        """Return this thread's own connection, in this process."""
        local = self._local
        # One that is owed a reply is in use by what a signal handler interrupted, or was left by a
        # SoftTimeout.
        if getattr(local, "pid", None) != os.getpid() or local.connection.is_owed:
            local.connection, local.pid = Connection(self.client.connection_pool), os.getpid()
        return local.connection  # type: ignore[no-any-return]

    def run_script(self, name: str, keys: Sequence[object], args: Sequence[object]) -> Any:
        """Call a script on this thread's connection."""
        return self.run_packed(name, pack_script(name, keys, args))

    def run_packed(self, name: str, command: bytes) -> Any:
        """Call a script whose call was packed before, by `pack_script`."""
        connection = self.connection()
        try:
            return connection.call(command)
        except redis.exceptions.NoScriptError:
            # A new server, or SCRIPT FLUSH: nothing was executed.
            source, _ = script(name)
            connection.call(pack("SCRIPT", "LOAD", source))
            return connection.call(command)

    def report_refusal(self, refusal: str) -> None:
        """Log what Redis refuses, such as a key of a wrong type.

        Once a minute, not at every call.
        """
        now = time.monotonic()
        if now >= self._reported.get(refusal, 0.0):
            if len(self._reported) > MOST_REFUSALS:
                self._reported.clear()
            self._reported[refusal] = now + REPORT_EVERY
            logger.error("Redis refuses: %s", refusal)

    def ping(self) -> None:
        """Make a round trip."""
        self.client.ping()

    def close(self) -> None:
        """Close the connections; other threads' own ones end with their threads."""
        self.client.close()
        if (connection := getattr(self._local, "connection", None)) is not None:
            connection.close()


def pack(*arguments: object) -> bytes:
    """Return a command as the server reads it."""
    parts = [b"*%d\r\n" % len(arguments)]
    for argument in arguments:
        data = argument if isinstance(argument, bytes) else str(argument).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(parts)


def pack_script(name: str, keys: Sequence[object], args: Sequence[object]) -> bytes:
    """Return the call of a script as the server reads it."""
    _, digest = script(name)
    return pack("EVALSHA", digest, len(keys), *keys, *args)


def backoff(failures: int) -> float:
    """Return how many seconds to wait after so many failures in a row.

    It doubles, with jitter so that a fleet spreads out.
    """
    longest = min(0.05 * 2.0 ** min(failures, 10), LONGEST_BACKOFF)
    return random.uniform(0.5, 1.0) * longest  # noqa: S311 - no secret


@functools.cache
def script(name: str) -> tuple[bytes, str]:
    """Return the text of a script, and how the server names it."""
    text = (resources.files("wakaq.store") / "lua" / f"{name}.lua").read_bytes()
    return text, hashlib.sha1(text, usedforsecurity=False).hexdigest()


async def _close_with_loop(client: Any) -> AsyncGenerator[None, None]:
    """Close a client when its event loop ends, which closes the generators begun on it."""
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
