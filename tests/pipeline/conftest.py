"""A Stable Diffusion of a few hundred thousand weights, of the real classes, and LoRA files for it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from tiny_pipeline import build, make_components, make_tokenizer, write_lora
from xl_components import make_xl_components, write_xl_lora

from mole_diffusion import StableDiffusionMoLEPipeline, StableDiffusionXLMoLEPipeline


@pytest.fixture(scope="session")
def components(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tiny networks; `pipe` and `plain` copy them, so no test sees another's hooks."""
    return make_components(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def lora_files(tmp_path_factory: pytest.TempPathFactory, components: dict[str, Any]) -> dict[str, Path]:
    """Three experts of different ranks; the clock has no text encoder part."""
    folder = tmp_path_factory.mktemp("loras")
    return {
        name: write_lora(folder / f"{name}.safetensors", components, seed, rank, text=name != "clock")
        for seed, (name, rank) in enumerate([("boot", 2), ("cat", 4), ("clock", 3)], start=1)
    }


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
    for name, path in lora_files.items():
        pipe.load_expert(path, name=name)
    return pipe


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
    pipe = build(StableDiffusionXLMoLEPipeline, xl_components)
    for name, path in xl_lora_files.items():
        pipe.load_expert(path, name=name)
    return pipe


Draw = Callable[..., torch.Tensor]


@pytest.fixture
def draw() -> Draw:
    """`draw(pipe, prompt)`: a picture (B, H, W, 3) from a fixed seed, in three steps."""

    def _draw(pipe: Any, prompt: str | Sequence[str] = "a boot and a cat", **kwargs: Any) -> torch.Tensor:
        prompts = None if "prompt_embeds" in kwargs else prompt
        settings = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "pt", **kwargs}
        if "generator" not in settings and "latents" not in settings:
            settings["generator"] = torch.Generator().manual_seed(7)
        pictures: torch.Tensor = pipe(prompts, **settings).images
        return pictures

    return _draw
