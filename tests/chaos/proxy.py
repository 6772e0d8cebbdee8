"""A TCP proxy that misbehaves on demand: it cuts, delays, stalls, and drops connections or replies.

One thread around a selector; what others ask of it waits in a queue, so that only that thread
touches sockets.
"""

import contextlib
import queue as queues
import random
import selectors
import socket
import threading
import time
from collections import deque
from typing import Any, Self

CHUNK = 1 << 16
CONNECT_TIMEOUT = 5.0
REPLY_CUTS = 10  # a second, while replies are cut


class Pipe:
    """One direction of a connection."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source, self.target = source, target
        self.waiting: deque[tuple[float, bytes]] = deque()  # when to pass on what
        self.is_frozen = False
        self.allowance: int | None = None  # bytes until the connection is dropped; None: any number
        self.back: Pipe | None = None  # the other direction
        self.answers_script = False  # what comes next here is the reply to a script


class Proxy:
    """Forwards every connection to an address; a context manager."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0)
        self.port: int = self._listener.getsockname()[1]
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._orders: queues.SimpleQueue[tuple[str, float]] = queues.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="proxy")

        # The thread only.
        self._selector = selectors.DefaultSelector()
        self._pipes: dict[socket.socket, Pipe] = {}  # by source
        self._delay = 0.0
        self._delayed_until = 0.0
        self._stalled_until = 0.0
        self._cuts_replies_until = 0.0
        self._next_reply_cut_at = 0.0
        self._is_over = False

    def __enter__(self) -> Self:
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._order("end", 0.0)
        self._thread.join()

    # -- any thread --------------------------------------------------------------------------------

    def cut(self) -> None:
        """Close every connection."""
        self._order("cut", 0.0)

    def cut_after(self, size: int) -> None:
        """Close each connection that there is now once so many bytes more have gone one way."""
        self._order("cut_after", size)

    def stall(self, seconds: float) -> None:
        """Pass nothing on for a time, then all of it.

        A connection that was given up meanwhile still delivers.
        """
        self._order("stall", seconds)

    def freeze(self) -> None:
        """Let each connection that there is now fall silent for ever, without closing it.

        New ones work.
        """
        self._order("freeze", 0.0)

    def cut_replies(self, seconds: float) -> None:
        """For that time, ten times a second, drop a connection in the place of a script's reply.

        The server has executed the script by then, and the client cannot know.
        """
        self._order("cut_replies", seconds)

    def delay(self, seconds: float) -> None:
        """Hold each piece back for a tenth of that time, for that time."""
        self._order("delay", seconds)

    def _order(self, what: str, value: float) -> None:
        self._orders.put((what, value))
        self._wake_writer.send(b"!")

    # -- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_over:
            for key, _ in self._selector.select(self._patience()):
                self._attend(key.fileobj)
            while not self._orders.empty():
                self._obey(*self._orders.get())
            now = time.monotonic()
            if now >= self._stalled_until:
                for pipe in list(self._pipes.values()):
                    self._pass_on(pipe, now)
        self._cut()
        for sock in (self._listener, self._wake_reader, self._wake_writer):
            sock.close()
        self._selector.close()

    def _attend(self, sock: Any) -> None:
        if sock is self._listener:
            self._accept()
        elif sock is self._wake_reader:
            self._wake_reader.recv(CHUNK)
        elif sock in self._pipes:
            self._receive(self._pipes[sock])

    def _patience(self) -> float | None:
        moments = [pipe.waiting[0][0] for pipe in self._pipes.values() if pipe.waiting]
        if not moments:
            return None
        return max(0.0, max(min(moments), self._stalled_until) - time.monotonic())

    def _obey(self, what: str, value: float) -> None:
        now = time.monotonic()
        match what:
            case "cut":
                self._cut()
            case "cut_after":
                for pipe in self._pipes.values():
                    pipe.allowance = int(value)
            case "freeze":
                self._freeze()
            case "end":
                self._is_over = True
            case _:
                self._misbehave(what, now, value)

    def _misbehave(self, what: str, now: float, seconds: float) -> None:
        """Do something for a time."""
        match what:
            case "cut_replies":
                self._cuts_replies_until = now + seconds
            case "stall":
                self._stalled_until = now + seconds
            case "delay":
                self._delay, self._delayed_until = seconds / 10, now + seconds

    def _freeze(self) -> None:
        for pipe in self._pipes.values():
            pipe.is_frozen = True
            pipe.waiting.clear()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            server = socket.create_connection(self._target, CONNECT_TIMEOUT)
        except OSError:  # it is away: so are we
            client.close()
            return
        forth, back = Pipe(client, server), Pipe(server, client)
        forth.back = back
        for pipe in (forth, back):
            pipe.source.settimeout(CONNECT_TIMEOUT)
            pipe.source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._pipes[pipe.source] = pipe
            self._selector.register(pipe.source, selectors.EVENT_READ)

    def _receive(self, pipe: Pipe) -> None:
        try:
            data = pipe.source.recv(CHUNK)
        except OSError:
            data = b""
        if pipe.is_frozen:
            if not data:
                self._close(pipe)
            return
        now = time.monotonic()
        if pipe.back is not None:
            pipe.back.answers_script = b"EVALSHA" in data
        elif pipe.answers_script and self._next_reply_cut_at <= now < self._cuts_replies_until:
            self._next_reply_cut_at = now + random.expovariate(REPLY_CUTS)
            self._close(pipe)
            return
        delay = self._delay if now < self._delayed_until else 0.0
        pipe.waiting.append((now + delay, data))
        if not data:  # nothing more comes, but what came before is still to be passed on
            self._selector.unregister(pipe.source)

    def _pass_on(self, pipe: Pipe, now: float) -> None:
        while pipe.waiting and pipe.waiting[0][0] <= now and pipe.source in self._pipes:
            _, data = pipe.waiting.popleft()
            is_last = not data
            if pipe.allowance is not None:
                data = data[: pipe.allowance]
                pipe.allowance -= len(data)
            with contextlib.suppress(OSError):
                pipe.target.sendall(data)
            if is_last or pipe.allowance == 0:
                self._close(pipe)

    def _close(self, pipe: Pipe) -> None:
        for sock in (pipe.source, pipe.target):
            if self._pipes.pop(sock, None) is not None:
                with contextlib.suppress(KeyError):
                    self._selector.unregister(sock)
                sock.close()

    def _cut(self) -> None:
        for pipe in list(self._pipes.values()):
            self._close(pipe)
