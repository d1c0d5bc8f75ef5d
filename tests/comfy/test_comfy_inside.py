"""Runs the tests that need ComfyUI's own modules, in ComfyUI's own environment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

FILES = sorted(path.name for path in (Path(__file__).parent / "inside").glob("inside_*.py"))


def test_there_are_files_to_run() -> None:
    assert len(FILES) >= 1


@pytest.mark.parametrize("name", FILES)
def test_inside(name: str, run_inside: Callable[[str], None]) -> None:
    run_inside(name)
