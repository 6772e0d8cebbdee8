"""Options of the chaos suite.

`pytest tests/chaos --minutes 20` runs seed after seed, each for a minute.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the suite's own modules


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("chaos")
    group.addoption("--minutes", type=float, default=0.0, help="how long the chaos suite goes on")
    group.addoption("--seed", type=int, default=None, help="the first seed of the chaos suite")
