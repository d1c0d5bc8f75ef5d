"""The GPU kit: the folder is complete, and a dry run on the CPU measures what a GPU will be measured by."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from bench.kit import LIMIT, THERE, WANTED, copy_sources, needed, size_of

# Wheels of all that is wanted took 37 MiB when this was written.
ROOM_FOR_WHEELS = 48 * 2**20


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kit")
    copy_sources(folder)
    return folder


def run_in(kit: Path, *command: object) -> str:
    # What is looked at is what was copied.
    own = {"PYTHONPATH": str(kit), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment = {**os.environ, **own}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=kit,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_dry_run_measures_everything(kit: Path, tmp_path: Path) -> None:
    run_in(kit, "bench/gpu.py", "--device", "cpu", "--tiny", "--rounds", 1, "--out", tmp_path)
    (table,) = tmp_path.glob("gpu-*.md")
    result = json.loads((tmp_path / "gpu-cpu.json").read_text())
    assert result["skipped"] == []
    assert [row["iterations"] for row in result["training"]] == [2, 2]
    assert [network["shape"] for network in result["steps"]] == ["tiny SD 1.5", "tiny SDXL"]
    for network in result["steps"]:
        assert network["missing"] == {}
        assert network["against_peft"] < 0.05
        for entry in network["batches"].values():
            assert len(entry["rows"]) == 6
            assert all(row["seconds"] and row["operations"] for row in entry["rows"].values())
    text = table.read_text()
    assert f"torch {version('torch')}" in text
    assert "`python bench/gpu.py --device cpu --tiny --rounds 1" in text


def test_the_tests_for_a_gpu_are_found_in_the_kit(kit: Path) -> None:
    listed = run_in(kit, "-m", "pytest", "tests/gpu", "-m", "gpu", "--collect-only", "-q")
    assert "test_gpu_hosts.py::test_offloading" in listed
    assert "test_gpu_invariants.py::test_regions[True-cuda-float16]" in listed


def test_the_kit_leaves_room_for_the_wheels(kit: Path) -> None:
    assert size_of(kit) < LIMIT - ROOM_FOR_WHEELS
    assert not [
        path for path in kit.rglob("*") if path.name == "__pycache__" or path.suffix == ".safetensors"
    ]
    assert (kit / "run.sh").is_file()


def test_wheels_are_those_of_this_environment_with_what_they_need() -> None:
    found = needed(WANTED)
    assert {name: found[name] for name in ("diffusers", "peft")} == {
        name: version(name) for name in ("diffusers", "peft")
    }
    assert {"huggingface-hub", "tokenizers", "pluggy", "click"} <= set(found)
    assert not set(found) & set(THERE)
