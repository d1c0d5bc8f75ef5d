"""The pages show the tables that the commands wrote."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "docs" / "tables.py"


@pytest.mark.skipif(not SCRIPT.is_file(), reason="the pages are not part of the source archive")
def test_tables_in_the_pages_are_those_of_the_files() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not SCRIPT.is_file(), reason="the pages are not part of the source archive")
def test_a_table_is_replaced_and_nothing_else() -> None:
    filled = runpy.run_path(str(SCRIPT))["filled"]
    page = "before\n<!-- table: bench/results/step.md -->\n| old |\n<!-- end -->\nafter\n"
    found = filled(page)
    assert "| old |" not in found
    assert "| bare UNet |" in found
    chosen = filled(page.replace("step.md -->", "step.md; variant, x bare UNet -->"))
    assert "| variant | x bare UNet |\n| --- | --- |\n| bare UNet | 1.00 |" in chosen
    assert found.startswith("before\n<!-- table:")
    assert found.endswith("<!-- end -->\nafter\n")
    rows = filled(page.replace("step.md -->", "step.md; variant, variant=bare UNet|nothing -->"))
    assert "| variant |\n| --- |\n| bare UNet |\n<!--" in rows
    with pytest.raises(SystemExit, match="no rows"):
        filled(page.replace("step.md -->", "step.md; variant, variant=nothing -->"))
