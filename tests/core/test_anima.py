"""Anima in the core: regions, what runs beside the transformer."""

from __future__ import annotations

import pytest
import torch
from tiny.networks import make_experts, randomise, run
from tiny.transformers import make_anima

from mole_diffusion import Expert, MoLEConfig, inject

from .test_invariants import assert_close, differs


@pytest.mark.parametrize("pooling", ["mean", "token"])
def test_regions_are_of_every_place_in_the_picture(pooling: str) -> None:
    network = make_anima()
    mixture = inject(network, make_experts(2, network), MoLEConfig(pooling=pooling))
    randomise(mixture)
    free = run(network)
    assert {"transformer_blocks.0", "transformer_blocks.0.context"} <= set(mixture.live_weights())
    assert all(weights.shape == (2, 2) for weights in mixture.live_weights().values())
    mixture.activate(region_masks={"dog": torch.ones(8, 8), "cat": torch.ones(8, 8)})
    assert_close(run(network), free)
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    mixture.activate(region_masks={"dog": left, "cat": 1 - left})
    masked = run(network)
    assert differs(masked, free)
    # Also in the first matrix, whose tokens lie in three axes.
    assert any(
        (weights == 0).any() for weights, _ in mixture._context.values["patch_embed.proj"].expanded.values()
    )


def test_the_adapter_of_its_language_model_is_named() -> None:
    state = {
        f"{name}.lora_{x}.weight": torch.ones(4, 4)
        for name in (f"diffusion_model.{end}" for end in ("blocks.0.self_attn.q_proj", "llm_adapter.norm.1"))
        for x in "AB"
    }
    expert = Expert.from_state_dict(state, name="dog")
    assert len(expert.report.loaded) == 2
    assert all("is not gated" in reason for reason in expert.report.ignored.values())
