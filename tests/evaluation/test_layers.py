"""Experts in some of their blocks alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mole_diffusion import ConfigError, StableDiffusionMoLEPipeline
from mole_diffusion.evaluation.layers import in_blocks
from mole_diffusion.evaluation.pictures.layers import InLayers
from mole_diffusion.evaluation.pictures.protocol import Variant, load_protocol

QUARTERS = ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))


def test_quarters_of_an_expert_are_all_of_it_and_draw_less() -> None:
    pipe = StableDiffusionMoLEPipeline.from_starter(experts=["boot"])
    expert = pipe.experts["boot"]
    parts = [in_blocks(expert, pipe.mixtures, *one) for one in QUARTERS]
    for part, own in expert.factors.items():
        found = [name for one in parts for name in one.factors.get(part, ())]
        assert sorted(found) == sorted(own), "each matrix is in one quarter"
        assert all(one.factors.get(part) for one in parts)

    def draw(mixture: Any) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        draws = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "output_type": "latent", "generator": draws}
        latents: torch.Tensor = pipe("a zorin boot on the beach", mixture=mixture, **options).images
        return latents

    whole, base = draw("la"), draw("none")
    torch.testing.assert_close(draw(InLayers(0.0, 1.0)), whole)
    for low, high in QUARTERS:
        quarter = draw(InLayers(low, high))
        assert 0 < (quarter - base).norm() < 1.5 * (whole - base).norm()
    torch.testing.assert_close(draw("la"), whole)
    assert list(pipe.experts) == ["boot"]


def test_layers_go_with_sums_alone() -> None:
    quarters = [method.mixture() for method in load_protocol("layers").methods if method.layers]
    assert quarters == [InLayers(*one) for one in QUARTERS]
    with pytest.raises(ConfigError, match="layers go with 'la' alone, and this is 'auto'"):
        Variant(name="auto", layers=(0.0, 0.5)).mixture()
