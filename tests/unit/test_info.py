"""What `wakaq-info --watch` makes of its history, and how tables look at 80 columns."""

from collections import deque

import pytest
from rich.console import Console

from wakaq.info import rates, sparklines, tables


def counts(done: int = 0, retried: int = 0, dead: int = 0, pending: int = 0) -> dict[str, object]:
    return {
        "priority": 1,
        "pending_tasks": pending,
        "pending_eta_tasks": 0,
        "inflight_tasks": 0,
        "dead_letters": 0,
        "stats": {"done": done, "retried": retried, "dead": dead, "redelivered": 0},
    }


def text(renderable: object) -> str:
    console = Console(width=80, highlight=False, markup=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


@pytest.mark.parametrize("history", [[], [(7.0, {"a": counts(9)})]])
def test_one_moment_has_no_rates(history):
    assert rates(deque(history)) == {}


def test_rates_are_those_since_the_last_refresh():
    history = deque(
        [
            (0.0, {"a": counts(0), "b": counts()}),
            (10.0, {"a": counts(100, 1, 2), "b": counts(5)}),
            (12.0, {"a": counts(150, 4, 3), "b": counts(5)}),
        ]
    )

    assert rates(history) == {"a": [25.0, 2.0], "b": [0.0, 0.0]}


def test_sparklines_show_throughput_and_backlog_of_all_queues_against_their_highest():
    moments = [(0, 0), (8, 100), (8, 400), (16, 800)]
    history = deque(
        (float(at), {"a": counts(done=done, pending=pending), "b": counts(pending=pending)})
        for at, (done, pending) in enumerate(moments)
    )
    throughput, backlog = (line.plain for line in sparklines(history, 3))

    assert throughput == "done/s             8  █▁█"
    assert backlog == "pending        1,600  ▂▅█"


def test_an_empty_history_is_drawn():
    assert [line.plain.split() for line in sparklines(deque(), 3)] == [
        ["done/s", "-"],
        ["pending", "-"],
    ]


def test_tables_fit_80_columns_whatever_runs():
    tasks = [{"name": f"send('{'x' * 100}[bold]')", "seconds": 1234.5}]
    children = [
        {"number": 1, "pid": 11, "rss": 123e6, "is_silent": True, "tasks": tasks},
        {"number": 2, "pid": 12, "rss": 0, "tasks": tasks * 3},
        {"number": 3, "pid": 13, "tasks": [{"name": "send()"}]},
        {"number": 4, "pid": 14, "tasks": []},
    ]
    supervisor = {"host": "a-rather-long-name.example", "children": children}
    found = {"queues": {"emails": counts(5, 1, 2)}, "workers": 1, "supervisors": [supervisor]}
    lines = text(tables(found, {})).splitlines()

    assert max(map(len, lines)) <= 80
    assert lines[1].split() == ["emails", "1", "0", "0", "0", "0", "5", "3"]
    assert "does not answer: send(" in lines[4]
    assert lines[4].split()[-3:] == ["1,234", "s", "123"]
    assert "3 tasks, such as send(" in lines[5]
    assert lines[6].split()[-2:] == ["send()", "0"]
    assert lines[7].split()[-2:] == ["idle", "0"]
