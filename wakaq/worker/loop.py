"""The worker's event loop, in a thread of its own that starts when it is first needed. Not for what runs on it.

Async tasks and async hooks share it, since what they open, such as a pool of connections, belongs to one loop.
"""

import asyncio
import inspect
import logging
import threading
from collections.abc import Callable
from contextvars import Context
from typing import Any

logger = logging.getLogger("wakaq.worker")


class EventLoop:
    """The loop and its thread; to be used from any other thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._run, name="wakaq-async", daemon=True).start()
            return self._loop

    def _run(self) -> None:
        assert self._loop is not None
        while True:
            try:
                self._loop.run_forever()
            # Broad, and wider than Exception: what a task has started by itself may call sys.exit(), which asyncio lets
            # through to here. The loop goes on with the others.
            except BaseException:
                logger.exception("An asyncio task tried to end the event loop")

    def call(self, context: Context, function: Callable[..., object], *args: Any) -> None:
        """Have the loop call a function soon."""
        self._started().call_soon_threadsafe(function, *args, context=context)

    def complete(self, result: Any) -> Any:
        """Return what a hook returned; if that is an awaitable, run it on the loop to its end."""
        if not inspect.isawaitable(result):
            return result

        async def main() -> Any:
            return await result

        return asyncio.run_coroutine_threadsafe(main(), self._started()).result()
