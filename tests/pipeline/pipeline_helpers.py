"""What several test files of the pipeline share."""

import warnings
from pathlib import Path
from typing import Any

import torch
from tiny.sd import build as build

from mole_diffusion.pictures.call import WithExperts

# Largest difference of a pixel (0..1) between our path and diffusers' in float32.
CLOSE = {"atol": 2e-4, "rtol": 0.0}


def with_adapters(plain: Any, lora_files: dict[str, Path], weights: dict[str, float]) -> Any:
    """The diffusers pipeline with the files as PEFT adapters of these weights."""
    with warnings.catch_warnings():
        # PEFT warns of every second adapter.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        for name in weights:
            plain.load_lora_weights(lora_files[name], adapter_name=name)
    plain.set_adapters(list(weights), list(weights.values()))
    return plain


def train_a_little(pipe: WithExperts) -> None:
    """Move every gate away from uniform."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for mixture in pipe.mixtures.values():
            for parameter in mixture.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
