"""A TCP proxy that makes Redis farther away.

What comes in goes out again a fixed time later, in order.

One thread around `select`, whose time-outs are exact to the microsecond (those of `epoll` are whole
milliseconds). Run as `python -m benchmarks.proxy PORT TARGET SECONDS`; SECONDS is the delay of each
direction, half a round trip.
"""

import select
import socket
import sys
import time
from collections import deque

_CHUNK = 1 << 18


class Proxy:
    """Forwards every connection to a target port."""

    def __init__(self, port: int, target: int, delay: float) -> None:
        self._target, self._delay = target, delay
        self._listener = socket.create_server(("127.0.0.1", port))
        self._peers: dict[socket.socket, socket.socket] = {}
        # What is under way, in the order it came: all wait equally long, so it is the order of
        # leaving, too.
        self._under_way: deque[tuple[float, socket.socket, bytes]] = deque()

    def run(self) -> None:
        """Forward until the process is ended."""
        while True:
            wait = max(0, self._under_way[0][0] - time.monotonic()) if self._under_way else None
            ready, _, _ = select.select([self._listener, *self._peers], [], [], wait)
            for sock in ready:
                if sock is self._listener:
                    self._accept()
                elif sock in self._peers:
                    self._receive(sock)
            now = time.monotonic()
            while self._under_way and self._under_way[0][0] <= now:
                self._deliver(*self._under_way.popleft()[1:])

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        server = socket.create_connection(("127.0.0.1", self._target))
        for sock, peer in ((client, server), (server, client)):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._peers[sock] = peer

    def _receive(self, sock: socket.socket) -> None:
        try:
            data = sock.recv(_CHUNK)
        except ConnectionError:
            data = b""
        self._under_way.append((time.monotonic() + self._delay, self._peers[sock], data))
        if not data:
            # Not read again; its peer hears of the end when all that came before has arrived.
            del self._peers[sock]

    def _deliver(self, sock: socket.socket, data: bytes) -> None:
        try:
            if data:
                sock.sendall(data)
            else:
                sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # It hung up meanwhile.


if __name__ == "__main__":
    Proxy(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])).run()
