"""Anima in the core: regions, what runs beside the transformer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny.networks import make_experts, randomise, run
from tiny.transformers import make_anima
from torch import nn

from mole_diffusion import Expert, MoLEConfig, inject
from mole_diffusion.core.export import lora_tensors
from mole_diffusion.core.networks import map_network

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


def test_blocks_of_the_adapter_are_not_those_of_the_network() -> None:
    """ComfyUI has it inside, and calls some of its matrices as those of the transformer."""
    network: Any = make_anima()
    sites = map_network(network).sites
    block = nn.Module()
    block.attn1 = nn.Module()
    block.attn1.to_q = nn.Linear(4, 4)
    network.llm_adapter = nn.Module()
    network.llm_adapter.transformer_blocks = nn.ModuleList([block])
    found = map_network(network).sites
    assert [(site.name, site.path) for site in found] == [(site.name, site.path) for site in sites]


@pytest.mark.parametrize("pooling", ["mean", "token"])
def test_feed_forwards_may_read_frames_rows_and_columns(pooling: str) -> None:
    """As in ComfyUI, where tokens lie in three axes."""
    network: Any = make_anima()
    mixture = inject(network, make_experts(2, network), MoLEConfig(pooling=pooling))
    randomise(mixture)
    expected = run(network)
    for module in (*(block.ff for block in network.transformer_blocks), network.proj_out):
        module.register_forward_pre_hook(lambda _, args: args[0].unflatten(1, (1, 4, 4)))
        module.register_forward_hook(lambda _, args, output: output.flatten(1, 3))
    assert_close(run(network), expected)


def test_kohya_writes_its_makers_names() -> None:
    network = make_anima()
    expert = make_experts(1, network)[0]
    factors = {"transformer": dict(expert.factors["transformer"])}
    kinds = {"transformer": map_network(network).architecture}
    written = lora_tensors(factors, "kohya", torch.float32, kinds=kinds)
    assert all(name.startswith("lora_unet_") for name in written)
    assert not any("transformer" in name for name in written)
    assert "lora_unet_blocks_0_self_attn_q_proj.lora_down.weight" in written
    assert "lora_unet_x_embedder_proj_1.lora_up.weight" in written
    read = Expert.from_state_dict(written, name="dog")
    assert not read.report.ignored
    assert read.factors["transformer"].keys() == factors["transformer"].keys()
