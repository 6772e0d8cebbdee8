"""Who has to go when memory is short."""

import re

import pytest

from wakaq.supervisor.events import Retire
from wakaq.supervisor.memory import GRACE, Memory, used_percent
from wakaq.supervisor.outage import Outage


@pytest.fixture
def outage():
    return Outage()


@pytest.fixture
def posted():
    return []


@pytest.fixture
def memory(make_child, posted, outage):
    children = [make_child(number) for number in (1, 2)]
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
    ((victim,),) = posted
    assert memory.is_exceeded
    memory.tick(99.9 + GRACE)
    assert (len(posted), victim.death) == (1, None)
    memory.tick(100.0 + GRACE)

    assert victim.death.reason == "it took too much memory"
    assert "is asked to stop after its task" in caplog.text
    assert re.search(rf"\(pid {victim.pid}, \d MB\), running nothing, is killed", caplog.text)


def test_the_next_victim_comes_when_the_first_is_gone(memory, posted):
    memory.test_used[0] = 90.0
    memory.tick(100.0)
    first = posted[0].child
    memory.test_children.remove(first)
    memory.tick(101.0)

    assert posted == [Retire(first), Retire(memory.test_children[0])]


def test_a_victim_is_spared_while_memory_is_fine_again(memory, posted):
    memory.test_used[0] = 90.0
    memory.tick(100.0)
    memory.test_used[0] = 50.0
    memory.tick(100.0 + 2 * GRACE)

    assert posted[0].child.death is None
    assert not memory.is_exceeded


@pytest.mark.parametrize("version", [1, 2])
def test_a_cgroups_limit_counts_where_it_is_nearer(tmp_path, version):
    names = {
        1: ("memory/memory.usage_in_bytes", "memory/memory.limit_in_bytes", "memory/memory.stat"),
        2: ("memory.current", "memory.max", "memory.stat"),
    }[version]
    cache = {1: "total_inactive_file", 2: "inactive_file"}[version]
    for name, text in zip(names, ("960000", "1000000", f"anon 5\n{cache} 10000\n"), strict=True):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    assert used_percent(tmp_path) == pytest.approx(95.0)
    (tmp_path / names[1]).write_text("max" if version == 2 else str(2**63))
    assert used_percent(tmp_path) == pytest.approx(used_percent(tmp_path / "none"), abs=5)
