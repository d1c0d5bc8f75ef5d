"""A tiny pipeline with three experts, one without a text encoder part, and pictures of what they know."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_pipeline import TRIGGERS, build, drawing, make_clip, make_components, write_lora

from mole_diffusion import StableDiffusionMoLEPipeline
from mole_diffusion.pictures.training import Concept, TrainingConfig

PROMPT = "a zor boot a vim cat a kip clock"


@pytest.fixture(scope="session")
def components(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tiny networks; the pipelines copy them."""
    return make_components(tmp_path_factory.mktemp("tokenizer"), TRIGGERS.values())


@pytest.fixture(scope="session")
def lora_files(tmp_path_factory: pytest.TempPathFactory, components: dict[str, Any]) -> dict[str, Path]:
    """Three experts of one rank; the clock has no text encoder part."""
    folder = tmp_path_factory.mktemp("loras")
    return {
        name: write_lora(folder / f"{name}.safetensors", components, seed, 3, text=name != "clock")
        for seed, name in enumerate(TRIGGERS, start=1)
    }


@pytest.fixture(scope="session")
def other_rank(tmp_path_factory: pytest.TempPathFactory, components: dict[str, Any]) -> Path:
    """An expert of another rank than the three."""
    return write_lora(tmp_path_factory.mktemp("other") / "other.safetensors", components, 9, 2)


@pytest.fixture
def plain(components: dict[str, Any]) -> StableDiffusionPipeline:
    """The diffusers pipeline: the oracle."""
    return build(StableDiffusionPipeline, components)


@pytest.fixture
def empty(components: dict[str, Any]) -> StableDiffusionMoLEPipeline:
    """Our pipeline without experts."""
    return build(StableDiffusionMoLEPipeline, components)


@pytest.fixture
def pipe(empty: StableDiffusionMoLEPipeline, lora_files: dict[str, Path]) -> StableDiffusionMoLEPipeline:
    """Our pipeline with the three experts and fresh gates."""
    for name, path in lora_files.items():
        empty.load_expert(path, name=name)
    return empty


@pytest.fixture
def concepts() -> dict[str, Concept]:
    """What the three know, with three reference pictures each."""
    skies = [(150, 190, 230), (230, 230, 230), (120, 200, 120)]
    return {
        name: Concept(
            name,
            f"a {word} {name}",
            f"a {name}",
            [drawing(name, 8 + 8 * i, sky) for i, sky in enumerate(skies)],
        )
        for name, word in TRIGGERS.items()
    }


@pytest.fixture
def tiny() -> Callable[..., TrainingConfig]:
    """`tiny(**changes)`: settings for tests: few steps, small pools, no bar."""

    def build(**changes: Any) -> TrainingConfig:
        settings: dict[str, Any] = {
            "iterations": 3,
            "collage_batch": 2,
            "pool_size": 4,
            "redraw_every": 2,
            "drawn_pictures": 2,
            "sampling_steps": 3,
            "views": 2,
            "crops": 4,
            "collage_background": "sources",
            "progress": False,
        }
        return TrainingConfig(**{**settings, **changes})

    return build


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny CLIP of random weights in open_clip's own format."""
    return make_clip(tmp_path_factory.mktemp("clip"), 3)


Draw = Callable[..., torch.Tensor]


@pytest.fixture
def draw() -> Draw:
    """`draw(pipe, ...)`: a picture (B, H, W, 3) from a fixed seed, in four steps."""

    def _draw(pipe: Any, **kwargs: Any) -> torch.Tensor:
        settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "pt", **kwargs}
        settings.setdefault("generator", torch.Generator().manual_seed(7))
        pictures: torch.Tensor = pipe(settings.pop("prompt", PROMPT), **settings).images
        return pictures

    return _draw
