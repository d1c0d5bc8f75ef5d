"""A tiny pipeline with three experts, one without a text encoder part, and pictures of what they know."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny.sd import (
    TRIGGERS,
    build,
    draw_tensor,
    drawing,
    make_clip,
    make_components,
    with_experts,
    write_lora,
    write_loras,
)
from tiny.settings import tiny_config

from mole_diffusion import StableDiffusionMoLEPipeline
from mole_diffusion.pictures.training import Concept, TrainingConfig

PROMPT = "a zorin boot a vim cat a kipra clock"


@pytest.fixture(scope="session")
def components(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tiny networks; the pipelines copy them."""
    return make_components(tmp_path_factory.mktemp("tokenizer"), TRIGGERS.values())


@pytest.fixture(scope="session")
def lora_files(tmp_path_factory: pytest.TempPathFactory, components: dict[str, Any]) -> dict[str, Path]:
    """Three experts of one rank; the clock has no text encoder part."""
    ranks = dict.fromkeys(TRIGGERS, 3)
    return write_loras(tmp_path_factory.mktemp("loras"), components, ranks, textless=["clock"])


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
    return with_experts(empty, lora_files)


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
    """`tiny(**changes)`: settings for tests."""
    return partial(tiny_config, iterations=3, sampling_steps=3)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny CLIP of random weights in open_clip's own format."""
    return make_clip(tmp_path_factory.mktemp("clip"), 3)


Draw = Callable[..., torch.Tensor]


@pytest.fixture
def draw() -> Draw:
    """`draw(pipe, ...)`: a picture (B, H, W, 3) from a fixed seed, in four steps."""

    def _draw(pipe: Any, prompt: str = PROMPT, **kwargs: Any) -> torch.Tensor:
        return draw_tensor(pipe, prompt, steps=4, **kwargs)

    return _draw
