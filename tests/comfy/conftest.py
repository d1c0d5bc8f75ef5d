"""A real ComfyUI for the tests of the node pack."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from comfy_environment import ComfyInstallation, installed
from comfy_server import ROOT, ComfyServer
from oracle import write_starter
from oracle_flux import write_flux
from oracle_sd15 import write_sd15

# Runs in ComfyUI's own environment, see test_comfy_inside.py.
collect_ignore = ["inside"]
INSIDE = Path(__file__).parent / "inside"


@pytest.fixture(scope="session")
def comfyui() -> ComfyInstallation:
    """ComfyUI in an environment of its own."""
    return installed()


@pytest.fixture(scope="session")
def oracle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What diffusers computed with the starter, and the gates it used."""
    folder = tmp_path_factory.mktemp("oracle")
    write_starter(folder)
    write_flux(folder / "transformers")
    return folder


@pytest.fixture(scope="session")
def run_inside(
    comfyui: ComfyInstallation, oracle_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., str]:
    """Runs test files of `inside/` in ComfyUI's environment and returns what they print; fails if they do."""
    base = tmp_path_factory.mktemp("comfy_base")

    def run(*arguments: str, fails: bool = True, **variables: str) -> str:
        environment = {
            **comfyui.environment(),
            "MOLE_COMFY_SOURCE": str(comfyui.source),
            "MOLE_COMFY_BASE": str(base),
            "MOLE_COMFY_ORACLE": str(oracle_folder),
            **variables,
        }
        command = [str(comfyui.python), "-m", "pytest", "-c", "pytest.ini", *arguments]
        result = subprocess.run(command, cwd=INSIDE, env=environment, capture_output=True, text=True)
        printed = f"{result.stdout[-8000:]}\n{result.stderr[-2000:]}"
        if result.returncode and fails:
            pytest.fail(printed, pytrace=False)
        return printed

    return run


@pytest.fixture(scope="session")
def sd15_folder(run_inside: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A random checkpoint, ControlNet and LoRAs of Stable Diffusion 1.5's shape, compared with diffusers."""
    folder = tmp_path_factory.mktemp("sd15")
    write_sd15(folder)
    run_inside("sd15_inside.py", MOLE_COMFY_SD15=str(folder))
    yield folder
    shutil.rmtree(folder)  # a gigabyte and more


@pytest.fixture(scope="session")
def server(comfyui: ComfyInstallation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """ComfyUI with our nodes as a symlink of `comfy_nodes/`, one for the whole run."""
    base, others = tmp_path_factory.mktemp("comfyui"), (Path(__file__).parent / "tiny_models",)
    with ComfyServer(comfyui, base, ROOT / "comfy_nodes", others) as running:
        yield running
