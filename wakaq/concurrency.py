"""Counts the processors this process may use, and evaluates `"cores*2"`.

Not for deciding who gets one.
"""

import ast
import math
import operator
import os
from collections.abc import Callable
from pathlib import Path

_MOST = 10_000  # processes, or tasks at once
_LONGEST = 200  # characters, so that nothing nests too deeply
_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}


def available_cores(
    cgroup_root: str = "/sys/fs/cgroup", own_cgroups: str = "/proc/self/cgroup"
) -> int:
    """Return how many processors this process may use, at least 1.

    They are those of its affinity, limited by the quotas of its cgroups, of version 1 or 2.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    cgroups = Path(own_cgroups)
    for line in cgroups.read_text().splitlines() if cgroups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = Path(cgroup_root, "cpu" if controllers else "")
        # In a container the path may be the host's, which is not there; then the root is the
        # container's own cgroup.
        cgroup = Path(path.lstrip("/"))
        quotas = [_quota(root / one) for one in (cgroup, *cgroup.parents)]
        cores = math.ceil(min(cores, *quotas))
    return max(cores, 1)


def _quota(cgroup: Path) -> float:
    """Return the processors that a cgroup's limit amounts to; infinite if it has none."""
    files = [cgroup / name for name in ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us")]
    try:
        quota, period = " ".join(file.read_text() for file in files if file.exists()).split()
        processors = float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):  # "max" is no number either
        return math.inf
    return processors if processors > 0 else math.inf


def evaluate(expression: int | str, cores: int | None = None, minimum: int = 1) -> int:
    """Return a number of processes or tasks, rounded down.

    An expression has numbers, `cores`, `+ - * / // **`, parentheses, `min` and `max`, and nothing
    else.

    Raises:
        ValueError: It is no such expression, or out of range; the message has the remedy.
    """
    remedy = 'give an int, or an expression such as "max(cores-1, 1)"'
    cores = cores or available_cores()
    text = str(expression).strip()
    try:
        if len(text) > _LONGEST:
            raise ValueError(f"longer than {_LONGEST} characters")  # noqa: TRY301 - remedy below
        value = _value(ast.parse(text, mode="eval").body, cores)
        is_in_range = minimum <= value < _MOST + 1
    except (ValueError, TypeError, SyntaxError, ArithmeticError) as error:
        raise ValueError(f"{error}; {remedy}") from error
    if not is_in_range:
        raise ValueError(f"{value:g} on {cores} cores is not in {minimum} to {_MOST}: {remedy}")
    return math.floor(value)


def _value(node: ast.expr, cores: int) -> float:
    # Floats throughout: 9**9**9 overflows at once instead of filling the memory with digits.
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return float(number)
        case ast.Name(id="cores"):
            return float(cores)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, cores)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, cores), _value(right, cores))
        case ast.Call(func=ast.Name(id="min" | "max" as name), args=[_, *_], keywords=[]):
            values = [_value(argument, cores) for argument in node.args]
            return min(values) if name == "min" else max(values)
        case _:
            raise ValueError(f"{ast.unparse(node)!r} is not allowed")
