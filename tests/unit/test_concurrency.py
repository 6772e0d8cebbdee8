import os

import pytest

from wakaq import ConfigError, WakaQ
from wakaq.concurrency import available_cores, evaluate

AFFINITY = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        (7, 7),
        ("7", 7),
        ("cores", 4),
        ("cores*4", 16),
        ("cores/3", 1),
        ("cores // 3 + 1", 2),
        ("max(cores-8, 1)", 1),
        ("min(cores, 2, 3)", 2),
        ("-(-cores) ** 1", 4),
        ("2**3", 8),
        ("cores*1.5", 6),
        (" (cores + 1) * 2 ", 10),
        (10_000, 10_000),
    ],
)
def test_an_expression_is_evaluated_and_rounded_down(expression, expected):
    assert evaluate(expression, 4) == expected


@pytest.mark.parametrize(
    "expression",
    [
        0,
        -1,
        10_001,
        True,
        None,
        2.5j,
        b"4",
        "",
        "cores-4",
        "cores/5",
        "9**9**9",
        "9**9**9**9**9**9",
        "1/0",
        "0.0**-1",
        "(-8)**0.5",
        "max((-8)**0.5, 1)",
        "1e999",
        "-1e999",
        "1e999-1e999",
        "threads",
        "cores.real",
        "__import__('os').getpid()",
        "max()",
        "max(*cores)",
        "max(1, key=2)",
        "abs(1)",
        "True",
        "'4'",
        "1 if cores else 2",
        "cores % 2",
        "~cores",
        "cores;cores",
        "cores\x00",
        "(" * 150 + "1" + ")" * 150,
        "-" * 151 + "1",
        "1+" * 1000 + "1",
    ],
)
def test_anything_else_is_refused_by_name_and_value(expression):
    with pytest.raises(ValueError, match=r"max\(cores-1, 1\)"):
        evaluate(expression, 4)


def test_0_is_allowed_where_the_minimum_says_so():
    assert evaluate(0, 4, minimum=0) == 0
    with pytest.raises(ValueError, match="-1 on 4 cores is not in 0 to 10000"):
        evaluate("cores-5", 4, minimum=0)


def test_an_application_names_the_option_and_the_value():
    with pytest.raises(ConfigError, match=r"WakaQ: concurrency='cores % 2': .*max\(cores-1, 1\)"):
        WakaQ(queues=["default"], concurrency="cores % 2")
    with pytest.raises(ConfigError, match="async_concurrency='0-1': -1 on"):
        WakaQ(queues=["default"], async_concurrency="0-1")


def cores_in(tmp_path, groups, files):
    (tmp_path / "self").write_text(groups)
    for name, content in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return available_cores(str(tmp_path / "root"), str(tmp_path / "self"))


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "100000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "5000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, AFFINITY),
        ("0::/a/b\n", {"a/cpu.max": "100000 100000\n", "a/b/cpu.max": "max 100000\n"}, 1),
        ("0::/not/there\n", {"cpu.max": "100000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "garbage\n"}, AFFINITY),
        ("0::/\n", {}, AFFINITY),
        (
            "4:cpu,cpuacct:/a\n1:memory:/b\n",
            {"cpu/a/cpu.cfs_quota_us": "90000\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
            1,
        ),
        (
            "4:cpu:/\n",
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            AFFINITY,
        ),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "1\n", "cpu/cpu.cfs_period_us": "0\n"}, AFFINITY),
        ("4:cpuset:/a\n", {"cpu.max": "100000 100000", "cpu/cpu.max": "1 100000"}, AFFINITY),
        ("0::/\n", {"cpu.max": "99900000 100000\n"}, AFFINITY),
    ],
)
def test_cores_are_what_affinity_and_quota_leave(tmp_path, groups, files, expected):
    assert cores_in(tmp_path, groups, files) == expected


def test_without_cgroups_cores_are_the_affinity(tmp_path):
    assert available_cores(str(tmp_path), str(tmp_path / "missing")) == AFFINITY
