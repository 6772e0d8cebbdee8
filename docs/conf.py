"""Sphinx: the pages are Markdown, the reference comes from docstrings.

`tox run -e docs` builds it, with no network.
"""

import importlib.metadata
from pathlib import Path

import wakaq

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results"

project = "WakaQ"
author = "The WakaQ authors"
copyright = "2026, The WakaQ authors"  # noqa: A001 - the name that Sphinx wants
version = release = importlib.metadata.version("wakaq")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build", "examples"]
nitpicky = True
default_role = "code"  # as our docstrings mean it

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "furo"
html_title = f"WakaQ {release}"
html_static_path = ["_static"]
html_css_files = ["wakaq.css"]

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
python_maximum_signature_line_length = 78
# The pages of the standard library and of pytest are elsewhere; what is private to us has none.
nitpick_ignore_regex = [
    (
        "py:.*",
        r"(collections|typing|datetime|os|_pytest)\..*|[a-z]+|[A-Za-z]+(Error|Exception)|Any|Path",
    ),
    (
        "py:.*",
        r"(wakaq\.[a-z]+\.)?(P|R|Hook|Wrapper|Task|Policy|Call)(\.args|\.kwargs)?",
    ),
]

# Applications import these names from `wakaq`, so that is where the reference has them.
for _name in wakaq.__all__:
    getattr(wakaq, _name).__module__ = "wakaq"


def fill_in_results(_app, name, source):
    """Put the latest figures into the page, if any were taken."""
    tables = RESULTS / "tables.md"
    if name == "benchmarks" and tables.exists():
        chart = "../benchmarks/results/chart.svg"
        figure = f"```{{image}} {chart}\n:alt: No-op tasks a second, for each queue\n```\n\n"
        has_chart = (RESULTS / "chart.svg").exists()
        text = (figure if has_chart else "") + tables.read_text()
        source[0] = source[0].replace("No results have been recorded yet.\n", text)


def setup(app):
    """Register what this file adds."""
    app.connect("source-read", fill_in_results)
