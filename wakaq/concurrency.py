"""Counts the processors this process may use, and evaluates `"cores*2"`. Not for deciding who gets one."""

import ast
import math
import operator
import os
from collections.abc import Callable
from pathlib import Path

from wakaq.errors import ConfigError

_MOST = 10_000
_LONGEST = 200  # characters; bounds the depth of the tree, too
_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}
_FUNCTIONS: dict[str, Callable[[list[float]], float]] = {"min": min, "max": max}


def available_cores(
    cgroup_root: str = "/sys/fs/cgroup", own_cgroups: str = "/proc/self/cgroup"
) -> int:
    """Return how many processors this process may use: its affinity, limited by its cgroups' quotas, at least 1."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        groups = Path(own_cgroups).read_text().splitlines()
    except OSError:
        return cores
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            root = Path(cgroup_root, "cpu" if controllers else "")
            # In a container the path may be the host's, which is not there; the root is then the container's own.
            leaf = Path(path.lstrip("/"))
            quotas = [_quota(root / folder) for folder in (leaf, *leaf.parents)]
            cores = math.ceil(min(cores, *quotas))
    return max(cores, 1)


def _quota(folder: Path) -> float:
    """Return the processors that a cgroup's limit amounts to, infinite if it has none."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        processors = float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):  # "max" is no number either
        return math.inf
    return processors if processors > 0 else math.inf


def evaluate(
    expression: int | str, cores: int, option: str = "concurrency", minimum: int = 1
) -> int:
    """Return a number of processes or tasks, rounded down.

    Args:
        expression: An int, or text of numbers, `cores`, `+ - * / // **`, parentheses, `min` and `max`.
        cores: What `cores` stands for.
        option: The option it was given for, to be named in errors.
        minimum: The smallest result that makes sense.

    Raises:
        ConfigError: It is neither, or the result is out of range.
    """
    remedy = 'give an int, or an expression such as "max(cores-1, 1)"'
    try:
        value = _parse(expression, cores) if isinstance(expression, str) else expression
    except (ValueError, SyntaxError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{option}={expression!r}: {error}; {remedy}") from error
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{option}={expression!r}: {remedy}")
    if not minimum <= value < _MOST + 1:
        span = f"{value:g} on {cores} cores, not in {minimum} to {_MOST}"
        raise ConfigError(f"{option}={expression!r} is {span}: {remedy}")
    return math.floor(value)


def _parse(expression: str, cores: int) -> float:
    if len(expression) > _LONGEST:
        raise ValueError(f"longer than {_LONGEST} characters")
    return _value(ast.parse(expression.strip(), mode="eval").body, cores)


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
            result = _OPERATORS[type(op)](_value(left, cores), _value(right, cores))
            if not isinstance(result, float):  # the root of a negative number
                raise ValueError(f"{ast.unparse(node)} is no number")  # noqa: TRY004
            return result
        case ast.Call(func=ast.Name(id="min" | "max" as name), args=[_, *_], keywords=[]):
            return _FUNCTIONS[name]([_value(argument, cores) for argument in node.args])
        case _:
            raise ValueError(f"{ast.unparse(node)!r} is not allowed")
