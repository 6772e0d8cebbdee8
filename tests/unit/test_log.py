import contextlib
import io
import logging
import sys
import threading

import pytest

from wakaq import ConfigError
from wakaq import log as log_module
from wakaq.log import configure, current, start_queue
from wakaq.message import Message
from wakaq.settings import LOG_FORMAT, TASK_LOG_FORMAT
from wakaq.titles import set_title


@pytest.fixture(autouse=True)
def _restored_root():
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        if handler not in before:
            handler.close()
    root.handlers[:] = before
    root.setLevel(level)


def configured(level=logging.INFO, file=None):
    configure(
        level,
        file,
        "%(levelname)s %(message)s",
        "%(task)s %(task_args)s %(task_kwargs)s %(task_retry)s %(message)s",
    )


def test_a_line_in_a_task_names_the_task_and_its_arguments(tmp_path):
    log = tmp_path / "log"
    configured(file=log)

    logging.getLogger("shop").info("before")
    token = current.set(Message("charge", [1], {"cents": 5}, retry=2))
    logging.getLogger("shop").warning("100%% of %s", "it")
    current.reset(token)
    logging.getLogger("wakaq.worker").error("after")

    assert log.read_text() == "INFO before\ncharge [1] {'cents': 5} 2 100% of it\nERROR after\n"


def test_without_a_file_it_is_stderr(monkeypatch):
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    configured(logging.WARNING)

    logging.getLogger("shop").info("quiet")
    logging.getLogger("shop").warning("loud")

    assert err.getvalue() == "WARNING loud\n"


def test_a_rotated_file_is_opened_anew(tmp_path):
    log = tmp_path / "log"
    configured(file=log)
    logging.getLogger("shop").info("old")
    log.rename(tmp_path / "log.1")
    logging.getLogger("shop").info("new")

    assert (tmp_path / "log.1").read_text() == "INFO old\n"
    assert log.read_text() == "INFO new\n"


def test_setting_up_twice_writes_a_line_once(tmp_path):
    configured(file=tmp_path / "a")
    configured(file=tmp_path / "b")
    logging.getLogger("shop").info("x")

    assert (tmp_path / "a").read_text() == ""
    assert (tmp_path / "b").read_text() == "INFO x\n"


def test_only_handlers_that_would_print_twice_are_removed(tmp_path):
    root = logging.getLogger()
    stream, tracker = logging.StreamHandler(), logging.NullHandler()
    root.addHandler(stream)
    root.addHandler(tracker)
    configured(file=tmp_path / "a")

    assert stream not in root.handlers
    assert tracker in root.handlers


def test_a_file_that_cannot_be_opened_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match=r"log file .*missing/log' cannot be opened"):
        configured(file=tmp_path / "missing" / "log")


def test_the_default_formats_work(tmp_path):
    log = tmp_path / "log"
    configure(logging.INFO, str(log), LOG_FORMAT, TASK_LOG_FORMAT)
    logging.getLogger("shop").info("plain")
    token = current.set(Message("charge", [1], {}))
    logging.getLogger("shop").info("inside")
    current.reset(token)
    plain, inside = log.read_text().splitlines()

    assert plain.endswith(": plain")
    assert "in charge args=[1] kwargs={} retry=0: inside" in inside


def test_the_package_prints_nothing_by_itself():
    # Without any handler, logging writes warnings to an application's stderr.
    handlers = logging.getLogger("wakaq").handlers

    assert any(type(handler) is logging.NullHandler for handler in handlers)


@pytest.mark.parametrize("title", ["wakaq-worker: idle", "\u00e4", "\ud800", "a\0b", ""])
def test_a_title_never_raises(title):
    set_title(title)


# -- the supervisor's queue ------------------------------------------------------------------------


@pytest.fixture
def stop_queue():
    """`stop_queue()` has the log written by a thread from now on, until the end of the test."""
    with contextlib.ExitStack() as stack:

        def start():
            stop = start_queue()
            stack.callback(stop)
            return stop

        yield start


class Gate(logging.Handler):
    """A log that takes nothing until the gate is opened."""

    def __init__(self):
        super().__init__()
        self.lines = []
        self.is_reached, self.opened = threading.Event(), threading.Event()

    def emit(self, record):
        self.is_reached.set()
        assert self.opened.wait(15)
        self.lines.append(record.getMessage())


def returns(function, *args):
    """Tell whether a call in another thread returns."""
    thread = threading.Thread(target=function, args=args, daemon=True)
    thread.start()
    thread.join(5)
    return not thread.is_alive()


@pytest.fixture
def gate():
    gate = Gate()
    logging.getLogger().addHandler(gate)
    yield gate
    gate.opened.set()


def test_a_log_that_blocks_holds_up_nobody_and_what_it_missed_is_counted(
    stop_queue, gate, monkeypatch
):
    monkeypatch.setattr(log_module, "MOST_RECORDS", 5)
    stop = stop_queue()
    logger = logging.getLogger("wakaq.supervisor")
    logger.warning("%s", "a")
    assert gate.is_reached.wait(5)
    for number in range(8):
        assert returns(logger.warning, "line %d", number)
    gate.opened.set()
    assert stop()

    lines = [f"line {number}" for number in range(5)]
    missed = "Log lines that were dropped, as it did not take them in time: 3"
    assert [line for line in gate.lines if line != missed] == ["a", *lines]
    assert gate.lines.count(missed) == 1


def test_the_end_does_not_wait_for_a_log_that_blocks(stop_queue, gate):
    stop = stop_queue()
    logging.getLogger("wakaq.supervisor").warning("a")

    assert returns(lambda: stop() and gate.opened.wait(15))


class Fails(logging.Handler):
    """Fails in one of the ways in which a handler can."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def filter(self, record):
        self._fail("filter")
        return super().filter(record)

    def emit(self, record):
        self._fail("emit")
        try:
            self.format(record)
        except TypeError:
            self.handleError(record)

    def format(self, record):
        if self.how == "format":
            raise TypeError
        return super().format(record)

    def handleError(self, _record):  # noqa: N802 - logging's name
        raise SystemExit

    def _fail(self, where):
        if self.how == where:
            raise SystemExit


@pytest.mark.parametrize("how", ["filter", "emit", "format"])
def test_a_handler_that_raises_stops_neither_the_thread_nor_the_log(stop_queue, tmp_path, how):
    logging.getLogger().addHandler(Fails(how))
    configured(file=tmp_path / "log")
    stop = stop_queue()
    logger = logging.getLogger("wakaq.supervisor")
    logger.warning("a")
    logger.warning("b")
    assert stop()

    assert (tmp_path / "log").read_text() == "WARNING a\nWARNING b\n"


def test_a_line_that_cannot_be_formatted_is_only_counted(stop_queue, tmp_path):
    configured(file=tmp_path / "log")
    stop = stop_queue()
    logging.getLogger("wakaq.supervisor").warning("%d", "a")
    logging.getLogger("wakaq.supervisor").warning("b")
    assert stop()

    assert (tmp_path / "log").read_text().startswith("WARNING b\nWARNING Log lines that were")


def test_what_a_handler_logs_does_not_go_on_for_ever(stop_queue, tmp_path):
    class Chatty(logging.Handler):
        def emit(self, _record):
            logging.getLogger("shop").warning("sent")

    logging.getLogger().addHandler(Chatty())
    configured(file=tmp_path / "log")
    stop = stop_queue()
    logging.getLogger("wakaq.supervisor").warning("a")
    assert stop()

    assert (tmp_path / "log").read_text() == "WARNING a\n"


def test_at_the_end_the_log_is_as_it_was(stop_queue, tmp_path):
    configured(file=tmp_path / "log")
    before = logging.getLogger().handlers[:]
    stop = stop_queue()
    error = ValueError("bad")
    logging.getLogger("wakaq.supervisor").error("a", exc_info=error)
    assert stop()
    logging.getLogger("shop").warning("c")

    assert logging.getLogger().handlers == before
    lines = (tmp_path / "log").read_text().splitlines()
    assert [lines[0], *lines[-2:]] == ["ERROR a", "ValueError: bad", "WARNING c"]
