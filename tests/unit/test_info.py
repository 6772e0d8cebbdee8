"""What `wakaq-info --watch` makes of its history, and how tables look at 80 columns."""

from collections import deque

import pytest
from rich.console import Console

from wakaq.info import Sample, rates, sparklines, tables
from wakaq.store.inspect import QueueStats, Snapshot, SupervisorInfo


def counts(
    name: str, done: int = 0, retried: int = 0, dead: int = 0, pending: int = 0
) -> QueueStats:
    return QueueStats(
        name=name,
        priority=1,
        key=f"wakaq:{name}",
        eta_key=f"wakaq:eta:{name}",
        pending=pending,
        delayed=0,
        inflight=0,
        dead_letters=0,
        done=done,
        retried=retried,
        dead=dead,
        redelivered=0,
    )


def text(renderable: object) -> str:
    console = Console(width=80, highlight=False, markup=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


@pytest.mark.parametrize("history", [[], [Sample(7.0, [counts("a", 9)])]])
def test_one_moment_has_no_rates(history):
    assert rates(deque(history)) == {}


def test_rates_are_those_since_the_last_refresh():
    history = deque(
        [
            Sample(0.0, [counts("a", 0), counts("b")]),
            Sample(10.0, [counts("a", 100, 1, 2), counts("b", 5)]),
            Sample(12.0, [counts("a", 150, 4, 3), counts("b", 5)]),
        ]
    )

    assert rates(history) == {"a": (25.0, 2.0), "b": (0.0, 0.0)}


def test_sparklines_show_throughput_and_backlog_of_all_queues_against_their_highest():
    moments = [(0, 0), (8, 100), (8, 400), (16, 800)]
    history = deque(
        Sample(float(at), [counts("a", done=done, pending=pending), counts("b", pending=pending)])
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
    entry = {"host": "a-rather-long-name.example", "children": children}
    supervisor = SupervisorInfo.from_entry("s", entry)
    assert supervisor
    found = Snapshot((counts("emails", 5, 1, 2),), (supervisor,))
    lines = text(tables(found, {})).splitlines()

    assert max(map(len, lines)) <= 80
    assert lines[1].split() == ["emails", "1", "0", "0", "0", "0", "5", "3"]
    assert "does not answer: send(" in lines[4]
    assert lines[4].split()[-3:] == ["1,234", "s", "123"]
    assert "3 tasks, such as send(" in lines[5]
    assert lines[6].split()[-2:] == ["send()", "0"]
    assert lines[7].split()[-2:] == ["idle", "0"]


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"beat": 1, "concurrency": 1},
        {"children": 7},
        {"children": ["x"]},
        {"children": [{"pid": 1}]},
        {"children": [], "pid": "x"},
        {"children": [], "queues": 3},
    ],
)
def test_an_entry_that_is_not_a_supervisors_is_none(entry):
    assert SupervisorInfo.from_entry("s", entry) is None
