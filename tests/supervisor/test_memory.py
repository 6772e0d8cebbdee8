"""Who has to go when memory is short."""

import re
from types import SimpleNamespace

import psutil
import pytest

from wakaq.supervisor import memory as memory_module
from wakaq.supervisor.memory import GRACE, Memory, rss, used_percent


@pytest.fixture
def posted():
    return []


@pytest.fixture
def memory(make_child, posted, outage):
    children = [make_child(slot) for slot in (1, 2)]
    used = [50.0]
    guard = Memory(lambda: children, posted.append, 80, outage, lambda: used[0])
    guard.test_used, guard.test_children = used, children
    return guard


def test_below_the_limit_nobody_is_a_victim(memory, posted):
    memory.tick(100.0)

    assert posted == []
    assert not memory.is_exceeded


def test_one_victim_at_a_time_may_end_its_task_and_is_killed_after_a_grace(memory, posted, caplog):
    memory.test_used[0] = 80.0
    memory.tick(100.0)
    (victim,) = posted
    assert memory.is_exceeded
    memory.tick(99.9 + GRACE)
    assert (len(posted), victim.death) == (1, None)
    memory.tick(100.0 + GRACE)

    assert victim.death.reason == "it took too much memory"
    assert "is asked to stop after its task" in caplog.text
    assert re.search(rf"\(pid {victim.pid}\), \d+ MB, running nothing, is killed", caplog.text)


def test_the_next_victim_comes_when_the_first_is_gone(memory, posted):
    memory.test_used[0] = 90.0
    memory.tick(100.0)
    (first,) = posted
    memory.test_children.remove(first)
    memory.tick(101.0)

    assert posted == [first, memory.test_children[0]]


def test_a_victim_is_spared_while_memory_is_fine_again(memory, posted):
    memory.test_used[0] = 90.0
    memory.tick(100.0)
    memory.test_used[0] = 50.0
    memory.tick(100.0 + 2 * GRACE)

    assert posted[0].death is None
    assert not memory.is_exceeded


@pytest.fixture
def machine(monkeypatch):
    """A machine that has used half of its memory."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=100, available=50))


@pytest.mark.parametrize(
    ("current", "most", "percent"),
    [
        ("960000", "1000000", 95.0),
        ("410000", "1000000", 50.0),  # the machine is nearer to its end
        ("960000", "max", 50.0),
        ("960000", None, 50.0),
    ],
)
@pytest.mark.usefixtures("machine")
def test_a_cgroups_limit_counts_where_it_is_nearer(tmp_path, current, most, percent):
    (tmp_path / "memory.current").write_text(f"{current}\n")
    # What is cached, and may be dropped, is not used.
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 10000\nactive_file 7\n")
    if most is not None:
        (tmp_path / "memory.max").write_text(f"{most}\n")

    assert used_percent(tmp_path) == pytest.approx(percent)


@pytest.mark.usefixtures("machine")
def test_without_a_cgroup_the_machine_counts(tmp_path):
    assert used_percent(tmp_path / "none") == 50.0


def test_the_heaviest_worker_is_the_victim(memory, posted, monkeypatch):
    weights = dict(zip(memory.test_children, (3_000_000, 7_000_000), strict=True))
    monkeypatch.setattr(memory_module, "rss", weights.get)
    memory.test_used[0] = 90.0
    memory.tick(100.0)

    assert posted == memory.test_children[1:]


def test_a_living_worker_takes_memory_and_one_that_is_gone_takes_none(child):
    assert rss(child) > 0
    child.end()

    assert rss(child) == 0
