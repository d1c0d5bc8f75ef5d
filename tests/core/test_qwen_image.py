"""Qwen-Image in the core: texts of several lengths, pictures that are shown."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny.networks import make_experts, randomise
from tiny.transformers import make_qwen_image, qwen_image_inputs

from mole_diffusion import Expert, MoLEConfig, RegionMaskError, inject
from mole_diffusion.core.bases import base_of_expert

from .test_invariants import FORMS, assert_close, differs, form_id

forms = pytest.mark.parametrize("form", [form for form in FORMS if form.pooling != "flatten"], ids=form_id)


def test_a_file_of_attention_alone_is_told_by_its_blocks() -> None:
    """Its names are those of FLUX.1, which has fewer double blocks of that width."""
    for blocks, family in ((60, "Qwen-Image"), (19, None)):
        state = {}
        for block in range(blocks):
            name = f"transformer.transformer_blocks.{block}.attn.to_q"
            state[f"{name}.lora_A.weight"] = torch.zeros(1, 3072)
            state[f"{name}.lora_B.weight"] = torch.zeros(3072, 1)
        assert base_of_expert(Expert.from_state_dict(state, name="dog")).family == family


@forms
def test_padding_of_a_text_counts_nowhere(form: MoLEConfig) -> None:
    network = make_qwen_image()
    mixture = inject(network, make_experts(3, network), form)
    randomise(mixture)
    told: dict[str, Any] = qwen_image_inputs()
    with torch.no_grad():
        both, gates = network(**told).sample, mixture.live_weights()
        alone = {name: value[1:] for name, value in told.items()}
        for name in ("encoder_hidden_states", "encoder_hidden_states_mask"):
            alone[name] = alone[name][:, :5]
        assert_close(both[1:], network(**alone).sample)
        for label, weights in mixture.live_weights().items():
            torch.testing.assert_close(gates[label][1:], weights, rtol=1e-3, atol=1e-5)
        told["encoder_hidden_states_mask"] = torch.ones(2, 12, dtype=torch.bool)
        assert differs(network(**told).sample[1:], both[1:])


@pytest.mark.parametrize("pooling", ["mean", "token"])
def test_tokens_of_shown_pictures_have_gates_and_no_regions(pooling: str) -> None:
    network = make_qwen_image()
    mixture = inject(network, make_experts(2, network), MoLEConfig(pooling=pooling))
    randomise(mixture)
    told: dict[str, Any] = qwen_image_inputs()
    shown = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(9))
    told["hidden_states"] = torch.cat([told["hidden_states"], shown], dim=1)
    told["img_shapes"] = [[(1, 4, 4), (1, 2, 3)] for _ in range(2)]
    with torch.no_grad():
        free = network(**told).sample
        full = torch.ones(8, 8)
        mixture.activate(region_masks={"dog": full, "cat": full})
        assert_close(network(**told).sample, free)
        left = torch.zeros(8, 8)
        left[:, :4] = 1
        mixture.activate(region_masks={"dog": left, "cat": 1 - left})
        assert differs(network(**told).sample, free)
        # What is shown keeps both experts; what is drawn has one on each side.
        image = mixture._context.values["transformer_blocks.1"]
        for weights, _ in image.expanded.values():
            rows = weights.view(2, 22, -1)
            assert torch.all(rows[:, 16:] > 0)
            assert torch.all((rows[:, :16] == 0).any(-1))
        sizes = [[(1, 4, 4), (1, 2, 3)], [(1, 2, 8), (1, 2, 3)]]
        with pytest.raises(RegionMaskError, match="need the latent's size"):
            network(**{**told, "img_shapes": sizes})
