"""A tiny pipeline with two experts, pictures of single objects, and a tiny open_clip folder."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_model

from mole_diffusion import MoLEConfig, StableDiffusionMoLEPipeline
from mole_diffusion.training import Concept, TrainingConfig

PROMPT = "a zor boot and a vim cat"
COLOURS = {"boot": (220, 30, 40), "cat": (250, 200, 40)}


def _tiny_pipeline() -> ModuleType:
    """The builders of the pipeline's tests: the same real classes, the same tiny sizes."""
    path = Path(__file__).parents[1] / "pipeline" / "conftest.py"
    # pytest does the same when it loads that file itself: it imports its helpers from beside it.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location("tiny_pipeline", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_pipeline"] = module
    spec.loader.exec_module(module)
    module.WORDS.extend(["zor", "vim"])
    return module


TINY = _tiny_pipeline()


def drawing(name: str, x: int, background: tuple[int, int, int], size: int = 64) -> Image.Image:
    """One filled shape, ``size`` / 2 wide, whose left side is at ``x``."""
    picture = Image.new("RGB", (size, size), background)
    box = (x, size // 4, x + size // 2, 3 * size // 4)
    pen = ImageDraw.Draw(picture)
    (pen.rectangle if name == "boot" else pen.ellipse)(box, fill=COLOURS[name])
    return picture


@pytest.fixture(scope="session")
def components(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tiny networks; `pipe` copies them."""
    return TINY.make_components(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def lora_files(tmp_path_factory: pytest.TempPathFactory, components: dict[str, Any]) -> dict[str, Path]:
    """Two experts of different ranks for UNet and text encoder."""
    folder = tmp_path_factory.mktemp("loras")
    return {
        name: TINY.write_lora(folder / f"{name}.safetensors", components, seed, rank)
        for seed, (name, rank) in enumerate([("boot", 2), ("cat", 3)], start=1)
    }


@pytest.fixture
def pipe(components: dict[str, Any], lora_files: dict[str, Path]) -> StableDiffusionMoLEPipeline:
    """A pipeline with two experts and fresh token gates."""
    built = TINY.build(StableDiffusionMoLEPipeline, components)
    built.configure(MoLEConfig())
    for name, path in lora_files.items():
        built.load_expert(path, name=name)
    return built


@pytest.fixture
def concepts() -> list[Concept]:
    """A boot and a cat with two reference pictures each."""
    return [
        Concept(
            name, f"a {trigger} {name}", f"a {name}", [drawing(name, x, (150, 190, 230)) for x in (12, 18)]
        )
        for name, trigger in (("boot", "zor"), ("cat", "vim"))
    ]


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny CLIP of random weights in open_clip's own format, as the starter ships one."""
    folder = tmp_path_factory.mktemp("clip")
    model = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    means = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": means}))
    torch.manual_seed(3)
    network = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_model(network, str(folder / "open_clip_model.safetensors"))
    return f"local-dir:{folder}"


def tiny_config(**changes: Any) -> TrainingConfig:
    """Settings for tests: few steps, small pools, no bar."""
    settings: dict[str, Any] = {
        "iterations": 4,
        "collage_batch": 2,
        "pool_size": 4,
        "redraw_every": 2,
        "drawn_pictures": 2,
        "sampling_steps": 4,
        "views": 2,
        "crops": 4,
        "collage_background": "sources",
        "progress": False,
    }
    return TrainingConfig(**{**settings, **changes})


def gate_values_of(pipe: Any) -> dict[str, torch.Tensor]:
    """All gate parameters of a pipeline, copied."""
    return {
        f"{part}.{name}": value.detach().clone()
        for part, mixture in pipe.mixtures.items()
        for name, value in mixture.gates.state_dict().items()
    }


def drawing_tensor(name: str, x: int, background: tuple[int, int, int]) -> torch.Tensor:
    """A drawing as (3, H, W) in 0..1."""
    return torch.from_numpy(np.asarray(drawing(name, x, background)).copy()).permute(2, 0, 1).float() / 255


@pytest.fixture
def tiny_build() -> Callable[..., Any]:
    """`tiny_build(cls, components)`: a silent pipeline on copies of the components."""
    build: Callable[..., Any] = TINY.build
    return build


@pytest.fixture
def tiny() -> Callable[..., TrainingConfig]:
    """`tiny(**changes)`: settings for tests."""
    return tiny_config


@pytest.fixture
def gate_values() -> Callable[[Any], dict[str, torch.Tensor]]:
    """`gate_values(pipe)`: all gate parameters, copied."""
    return gate_values_of


@pytest.fixture
def picture() -> Callable[..., torch.Tensor]:
    """`picture(name, x, background)`: a tensor with one shape at column x."""
    return drawing_tensor
