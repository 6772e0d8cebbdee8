"""The site as Sphinx builds it.

`tox run -e docs` has what this needs, and elsewhere it is skipped.
"""

import subprocess
import sys
from pathlib import Path

import pytest

import wakaq

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.timeout(120)
def test_the_site_has_every_public_name(tmp_path):
    pytest.importorskip("sphinx", reason="needs the dependency group `docs`")
    inventory = pytest.importorskip("sphinx.util.inventory")
    command = [sys.executable, "-m", "sphinx", "-n", "-W", "-q", "-b", "html", DOCS, tmp_path]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    found = inventory.InventoryFile.loads((tmp_path / "objects.inv").read_bytes(), uri="")
    kinds = ("class", "exception", "method", "property", "attribute")
    names = {name for kind in kinds for name in found.data.get(f"py:{kind}", {})}

    for name in wakaq.__all__:
        assert f"wakaq.{name}" in names
        # Fields are in the class's own text.
        fields = getattr(getattr(wakaq, name), "__dataclass_fields__", ())
        for member in vars(getattr(wakaq, name)):
            if not member.startswith("_") and member not in fields:
                assert f"wakaq.{name}.{member}" in names
