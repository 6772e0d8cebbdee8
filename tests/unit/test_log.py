import io
import logging
import sys

import pytest

from wakaq import ConfigError
from wakaq.log import configure, current
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
