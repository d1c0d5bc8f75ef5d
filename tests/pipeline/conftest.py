"""A Stable Diffusion of a few hundred thousand weights, of the real classes, and LoRA files for it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from tiny.sd import build, draw_tensor, make_components, make_tokenizer, with_experts, write_loras
from tiny.sdxl import make_xl_components, write_xl_lora

from mole_diffusion import StableDiffusionMoLEPipeline, StableDiffusionXLMoLEPipeline


@pytest.fixture(scope="session")
def components(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tiny networks; `pipe` and `plain` copy them, so no test sees another's hooks."""
    return make_components(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def lora_files(tmp_path_factory: pytest.TempPathFactory, components: dict[str, Any]) -> dict[str, Path]:
    """Three experts of different ranks; the clock has no text encoder part."""
    ranks = {"boot": 2, "cat": 4, "clock": 3}
    return write_loras(tmp_path_factory.mktemp("loras"), components, ranks, textless=["clock"])


@pytest.fixture
def plain(components: dict[str, Any]) -> StableDiffusionPipeline:
    """The diffusers pipeline: the oracle."""
    return build(StableDiffusionPipeline, components)


@pytest.fixture
def pipe(components: dict[str, Any]) -> StableDiffusionMoLEPipeline:
    """Our pipeline without experts."""
    return build(StableDiffusionMoLEPipeline, components)


@pytest.fixture
def loaded(pipe: StableDiffusionMoLEPipeline, lora_files: dict[str, Path]) -> StableDiffusionMoLEPipeline:
    """Our pipeline with the three experts and fresh gates."""
    return with_experts(pipe, lora_files)


@pytest.fixture(scope="session")
def xl_components(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tiny networks of an SDXL."""
    return make_xl_components(make_tokenizer(tmp_path_factory.mktemp("xl_tokenizer")))


@pytest.fixture(scope="session")
def xl_lora_files(tmp_path_factory: pytest.TempPathFactory, xl_components: dict[str, Any]) -> dict[str, Path]:
    """Two experts of different ranks for the UNet and both text encoders."""
    folder = tmp_path_factory.mktemp("xl_loras")
    return {
        name: write_xl_lora(folder / f"{name}.safetensors", xl_components, seed, rank)
        for seed, (name, rank) in enumerate([("boot", 2), ("cat", 4)], start=1)
    }


@pytest.fixture
def xl_plain(xl_components: dict[str, Any]) -> StableDiffusionXLPipeline:
    """The diffusers pipeline of SDXL."""
    return build(StableDiffusionXLPipeline, xl_components)


@pytest.fixture
def xl_loaded(xl_components: dict[str, Any], xl_lora_files: dict[str, Path]) -> StableDiffusionXLMoLEPipeline:
    """Our SDXL pipeline with two experts and fresh gates."""
    return with_experts(build(StableDiffusionXLMoLEPipeline, xl_components), xl_lora_files)


Draw = Callable[..., torch.Tensor]


@pytest.fixture
def draw() -> Draw:
    """`draw(pipe, prompt)`: a picture (B, H, W, 3) from a fixed seed, in three steps."""

    def _draw(pipe: Any, prompt: str | Sequence[str] = "a boot and a cat", **kwargs: Any) -> torch.Tensor:
        return draw_tensor(pipe, prompt, steps=3, **kwargs)

    return _draw
