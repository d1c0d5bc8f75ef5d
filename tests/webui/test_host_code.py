"""The hosts' own text engine, prompt parser and sampler, without a running web UI; opt-in, with a checkout.

    MOLE_WEBUI_DIR=/path/to/webui pytest tests/webui/test_host_code.py

It needs no checkpoint and none of the host's libraries but `lark`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DIR = os.environ.get("MOLE_WEBUI_DIR")
pytestmark = pytest.mark.skipif(not DIR, reason="MOLE_WEBUI_DIR names no web UI")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def drawn() -> dict[str, Any]:
    pytest.importorskip("lark", reason="the hosts' prompt parser needs lark")
    paths = [str(HERE.parents[1]), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(HERE / "drive_host_code.py"), str(DIR)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def steps_of(case: dict[str, Any]) -> list[set[str]]:
    """The experts of the rows, step by step: a host may draw the rows of a step in several forwards."""
    count = len(case["acting"]) // 3
    forwards = case["acting"]
    return [{row for one in forwards[i * count : (i + 1) * count] for row in one} for i in range(3)]


def test_it_draws_what_auto_draws_in_diffusers(drawn: dict[str, Any]) -> None:
    for name in ("plain", "negative", "one"):
        for case in (name, f"{name}, padded"):
            assert drawn[case]["gap"] < 1e-4, case


def test_every_form_of_a_prompt_is_read(drawn: dict[str, Any]) -> None:
    why = "AND in a batch of several pictures: draw them one after another (batch size 1)"
    for name, case in drawn.items():
        assert case["clean"], name
        assert case["gap"] < 1e3, name
        assert case["mixed"] == (f"equal shares, as {why}" if name.startswith("batch and") else None), name
        assert len(case["said"]) == (case["mixed"] is not None), name


def test_each_text_has_its_own_experts(drawn: dict[str, Any]) -> None:
    for padded in ("", ", padded"):
        assert steps_of(drawn[f"edited{padded}"]) == [{"boot cat"}, {"boot cat"}, {"cat clock"}]
        assert steps_of(drawn[f"alternating{padded}"])[-1] == {"cat clock"}
        for name in ("and", "long and"):
            assert steps_of(drawn[f"{name}{padded}"]) == [{"boot clock", "cat", "boot cat clock"}] * 3
        assert steps_of(drawn[f"batch{padded}"]) == [{"boot cat", "boot clock"}] * 3
