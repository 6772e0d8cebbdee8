"""What is told of workers, living and dead."""

import logging
import time

import pytest

from wakaq.supervisor.child import Death
from wakaq.supervisor.memory import rss
from wakaq.supervisor.reports import cause, describe, report_death


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (0, "exited with status 0"),
        (-11, "was killed by SIGSEGV"),
        (-40, "was killed by signal 40"),
        (255, "ended, nobody knows how"),
        (None, "ended, nobody knows how"),
    ],
)
def test_a_status_is_said_as_people_say_it(status, said):
    assert cause(status) == said


def test_a_death_is_one_sentence(child, caplog):
    child.death = Death("it took too much memory")
    child.spawned_at = time.monotonic() - 12.3
    report_death(child, -9, ["a()", "b()"])

    ((_, level, text),) = caplog.record_tuples
    assert level == logging.WARNING
    assert text == (
        f"Worker 1 (pid {child.pid}) was killed by SIGKILL after 12.3 s, by us, because of: it took"
        " too much memory, while it ran a(), b()"
    )


def test_the_registry_says_what_each_worker_does(child):
    child.run("a", now=time.monotonic() - 5.0)
    (entry,) = describe([child], {child})

    assert entry.pop("rss") == rss(child) > 0
    assert entry == {
        "number": 1,
        "pid": child.pid,
        "is_silent": True,
        "tasks": [{"name": "a()", "seconds": 5.0}],
    }
