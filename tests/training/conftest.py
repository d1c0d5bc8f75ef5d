"""A tiny pipeline with two experts, pictures of single objects, and a tiny open_clip folder."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny.sd import build, drawing, make_clip, make_components, with_experts, write_loras
from tiny.settings import tiny_config

from mole_diffusion import MoLEConfig, StableDiffusionMoLEPipeline
from mole_diffusion.pictures.training import Concept, TrainingConfig

PROMPT = "a zorin boot and a vim cat"


@pytest.fixture(scope="session")
def components(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tiny networks; `pipe` copies them."""
    return make_components(tmp_path_factory.mktemp("tokenizer"), ("zorin", "vim"))


@pytest.fixture(scope="session")
def lora_files(tmp_path_factory: pytest.TempPathFactory, components: dict[str, Any]) -> dict[str, Path]:
    """Two experts of different ranks for UNet and text encoder."""
    return write_loras(tmp_path_factory.mktemp("loras"), components, {"boot": 2, "cat": 3})


@pytest.fixture
def pipe(components: dict[str, Any], lora_files: dict[str, Path]) -> StableDiffusionMoLEPipeline:
    """A pipeline with two experts and fresh token gates."""
    built = build(StableDiffusionMoLEPipeline, components)
    built.configure(MoLEConfig())
    return with_experts(built, lora_files)


@pytest.fixture
def concepts() -> list[Concept]:
    """A boot and a cat with two reference pictures each."""
    return [
        Concept(
            name, f"a {trigger} {name}", f"a {name}", [drawing(name, x, (150, 190, 230)) for x in (12, 18)]
        )
        for name, trigger in (("boot", "zorin"), ("cat", "vim"))
    ]


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny CLIP of random weights in open_clip's own format, as the starter ships one."""
    return make_clip(tmp_path_factory.mktemp("clip"), 3)


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
    return build


@pytest.fixture
def tiny() -> Callable[..., TrainingConfig]:
    """`tiny(**changes)`: settings for tests."""
    return partial(tiny_config, text_encoder_gates=True)


@pytest.fixture
def gate_values() -> Callable[[Any], dict[str, torch.Tensor]]:
    """`gate_values(pipe)`: all gate parameters, copied."""
    return gate_values_of


@pytest.fixture
def picture() -> Callable[..., torch.Tensor]:
    """`picture(name, x, background)`: a tensor with one shape at column x."""
    return drawing_tensor
