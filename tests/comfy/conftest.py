"""A real ComfyUI for the tests of the node pack."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from comfy_environment import ComfyInstallation, ComfyUnavailable, install
from oracle import write_starter

# Runs in ComfyUI's own environment, see test_comfy_inside.py.
collect_ignore = ["inside"]
INSIDE = Path(__file__).parent / "inside"


@pytest.fixture(scope="session")
def comfyui() -> ComfyInstallation:
    """ComfyUI in an environment of its own."""
    try:
        return install()
    except ComfyUnavailable as error:
        pytest.skip(f"no ComfyUI to test with: {error}")


@pytest.fixture(scope="session")
def oracle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What diffusers computed with the starter, and the gates it used."""
    folder = tmp_path_factory.mktemp("oracle")
    write_starter(folder)
    return folder


@pytest.fixture(scope="session")
def run_inside(
    comfyui: ComfyInstallation, oracle_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], None]:
    """Runs a test file of `inside/` in ComfyUI's environment and fails with its output."""
    base = tmp_path_factory.mktemp("comfy_base")

    def run(name: str) -> None:
        environment = {
            **{k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")},
            "MOLE_COMFY_SOURCE": str(comfyui.source),
            "MOLE_COMFY_BASE": str(base),
            "MOLE_COMFY_ORACLE": str(oracle_folder),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [str(comfyui.python), "-m", "pytest", "-c", "pytest.ini", name]
        result = subprocess.run(command, cwd=INSIDE, env=environment, capture_output=True, text=True)
        if result.returncode:
            pytest.fail(f"{result.stdout[-8000:]}\n{result.stderr[-2000:]}", pytrace=False)

    return run
