"""Runs in ComfyUI's own environment: ComfyUI without its server, and our nodes loaded as it loads them."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SOURCE = Path(os.environ["MOLE_COMFY_SOURCE"])
ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(SOURCE))
# What is shared with the tests outside.
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "comfy")]
sys.argv = ["main.py", "--cpu", "--base-directory", os.environ["MOLE_COMFY_BASE"]]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import torch  # noqa: E402
import utils.install_util  # noqa: E402, F401 - as main.py does, before something else is called utils


def load_nodes() -> ModuleType:
    """Our node pack, imported under a name that is no identifier, as ComfyUI does."""
    folder = ROOT / "comfy_nodes"
    name = str(folder)
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


# Test files import the core, which comes with the nodes.
load_nodes()


def part(name: str) -> Any:
    """One module of our node pack."""
    return importlib.import_module(f".{name}", str(ROOT / "comfy_nodes"))


@pytest.fixture(autouse=True)
def _inference_mode() -> Iterator[None]:
    """ComfyUI runs every node in inference mode."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def starter() -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE, loaded in inference mode."""
    with torch.inference_mode():
        loaded: tuple[Any, Any, Any] = part("starter").load_starter()
    return loaded


@pytest.fixture(scope="session")
def experts() -> Any:
    """Three experts of the starter in a set."""
    from mole_diffusion.core.experts import load_expert
    from mole_diffusion.starter import starter_experts

    found = part("experts").ExpertSet()
    for name in ("boot", "monster", "clock"):
        found = found.with_expert(load_expert(starter_experts()[name].path))
    return found


@pytest.fixture(scope="session")
def oracle() -> Path:
    """What diffusers computed, see test_comfy_inside.py."""
    return Path(os.environ["MOLE_COMFY_ORACLE"])


@pytest.fixture(scope="session", params=["flux", "z_image"])
def tiny(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, tuple[Any, Any, Any], Any]:
    """A family, its model, and two experts."""
    from tiny_loras import write_flux_lora, write_z_image_lora
    from tiny_models import transformers

    from mole_diffusion.core.experts import load_expert

    write = {"flux": write_flux_lora, "z_image": write_z_image_lora}[request.param]
    found, folder = part("experts").ExpertSet(), tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("dog", "cat")):
        path = write(folder, name, seed)
        with torch.inference_mode(False):
            found = found.with_expert(load_expert(path))
    with torch.inference_mode():
        return request.param, transformers.load(request.param), found
