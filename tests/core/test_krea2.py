"""Krea 2 in the core: text over layers and over words, padding, regions in one sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny.networks import make_experts, randomise, run
from tiny.transformers import krea2_inputs, make_krea2

from mole_diffusion import MoLEConfig, inject

from .test_invariants import FORMS, assert_close, differs, form_id

forms = pytest.mark.parametrize("form", [form for form in FORMS if form.pooling != "flatten"], ids=form_id)


@forms
def test_padding_counts_nowhere_and_layers_are_no_pictures(form: MoLEConfig) -> None:
    network = make_krea2()
    mixture = inject(network, make_experts(3, network), form)
    randomise(mixture)
    told: dict[str, Any] = krea2_inputs()
    with torch.no_grad():
        both, gates = network(**told).sample, mixture.live_weights()
        # Gates of the blocks that fuse layers speak for pictures too.
        assert all(weights.shape == (2, 3) for weights in gates.values())
        alone = {name: value if name == "position_ids" else value[1:] for name, value in told.items()}
        alone["encoder_hidden_states"] = alone["encoder_hidden_states"][:, :5]
        alone["encoder_attention_mask"] = alone["encoder_attention_mask"][:, :5]
        alone["position_ids"] = told["position_ids"][7:]
        assert_close(both[1:], network(**alone).sample)
        for label, weights in mixture.live_weights().items():
            torch.testing.assert_close(gates[label][1:], weights, rtol=1e-3, atol=1e-5)
        told["encoder_attention_mask"] = torch.ones(2, 12, dtype=torch.bool)
        assert (network(**told).sample[1:] - both[1:]).abs().max() > 1e-3


@pytest.mark.parametrize("pooling", ["mean", "token"])
def test_regions_are_of_the_picture_behind_the_text(pooling: str) -> None:
    network = make_krea2()
    mixture = inject(network, make_experts(2, network), MoLEConfig(pooling=pooling))
    randomise(mixture)
    free = run(network)
    mixture.activate(region_masks={"dog": torch.ones(8, 8), "cat": torch.ones(8, 8)})
    assert_close(run(network), free)
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    mixture.activate(region_masks={"dog": left, "cat": 1 - left})
    assert differs(run(network), free)
    image = mixture._context.values["transformer_blocks.1"]
    assert image.joint is not None
    owners = torch.tensor([0, 0, 1, 1, 1])
    for weights, _ in image.joint[1].values():
        grid = weights[:, 12:].view(2, 4, 4, 5)
        assert torch.all(grid[:, :, :2][..., owners == 1] == 0)
        assert torch.all(grid[:, :, 2:][..., owners == 0] == 0)
        assert torch.all(weights[:, :12] > 0)
