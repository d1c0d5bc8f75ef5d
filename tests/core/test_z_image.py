"""Z-Image in the core: lists of pictures and texts, padding in both, places that cannot be told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny.networks import make_experts, randomise
from tiny.transformers import make_z_image, z_image_inputs
from torch import nn

from mole_diffusion import Expert, InjectionError, MoLEConfig, inject
from mole_diffusion.core.bases import base_of_expert
from mole_diffusion.core.networks import find_network

from .test_invariants import FORMS, assert_close, differs, form_id

forms = pytest.mark.parametrize("form", [form for form in FORMS if form.pooling != "flatten"], ids=form_id)


def drawn(network: nn.Module, told: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack(network(**told).sample)


def test_lumina_2_is_not_taken_for_it() -> None:
    """Its makers' blocks have the same names, but for a modulation that stands behind an activation."""
    network = make_z_image()
    for layer in network.layers:
        layer.adaLN_modulation.insert(0, nn.SiLU())
    assert find_network(network) is None
    state = {"diffusion_model.layers.0.attention.qkv.lora_A.weight": torch.ones(1, 2304)}
    state["diffusion_model.layers.0.attention.qkv.lora_B.weight"] = torch.ones(3 * 2304, 1)
    assert base_of_expert(Expert.from_state_dict(state, name="dog")).family == "Lumina 2"


@forms
def test_a_text_among_longer_ones_is_drawn_as_it_is_alone(form: MoLEConfig) -> None:
    """And gates say the same: neither its own padding nor the batch's counts in means."""
    network = make_z_image()
    mixture = inject(network, make_experts(3, network), form)
    randomise(mixture)
    told = z_image_inputs(lengths=(7, 40, 33))
    told["t"] = torch.full((3,), 0.5)
    both, gates = drawn(network, told), mixture.live_weights()
    alone = {name: value[:1] for name, value in told.items()}
    assert_close(both[:1], drawn(network, alone))
    for label, weights in mixture.live_weights().items():
        assert weights.shape == (1, 3)
        torch.testing.assert_close(gates[label][:1], weights, rtol=1e-3, atol=1e-5)
    # Tokens of padding are one and the same, so that a mean over them too would be another.
    longer = {**alone, "cap_feats": [torch.cat([alone["cap_feats"][0], torch.ones(3, 32)])]}
    assert differs(drawn(network, longer), both[:1])


@pytest.mark.parametrize("pooling", ["mean", "token"])
def test_regions_end_where_the_padding_of_the_picture_begins(pooling: str) -> None:
    network = make_z_image()
    mixture = inject(network, make_experts(2, network), MoLEConfig(pooling=pooling))
    randomise(mixture)
    told = z_image_inputs()
    free = drawn(network, told)
    mixture.activate(region_masks={"dog": torch.ones(8, 8), "cat": torch.ones(8, 8)})
    assert_close(drawn(network, told), free)
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    mixture.activate(region_masks={"dog": left, "cat": 1 - left})
    assert differs(drawn(network, told), free)
    image = mixture._context.values["layers.1"]
    assert image.joint is not None
    owners = torch.tensor([0, 0, 1, 1, 1])
    for weights, _ in image.joint[1].values():
        assert weights.shape == (2, 32 + 64, 5)
        grid = weights[:, :16].view(2, 4, 4, 5)
        assert torch.all(grid[:, :, :2][..., owners == 1] == 0)
        assert torch.all(grid[:, :, 2:][..., owners == 0] == 0)
        assert torch.all(weights[:, 16:] > 0)


def test_places_that_cannot_be_told_are_refused() -> None:
    """Pictures of several sizes in one batch: nothing is drawn wrongly."""
    network = make_z_image()
    experts = make_experts(2, network)
    mixture = inject(network, experts, MoLEConfig())
    told = z_image_inputs()
    told["x"][1] = torch.randn(4, 1, 8, 12)
    with pytest.raises(
        InjectionError, match=r"holds text and image together, .* say of their places: nothing"
    ):
        drawn(network, told)
    mixture.eject()
    shown = Expert.from_state_dict(
        {
            **{f"layers.0.attention.to_q.lora_{x}.weight": torch.ones(48, 48) for x in "AB"},
            **{f"siglip_refiner.0.attention.to_q.lora_{x}.weight": torch.ones(48, 48) for x in "AB"},
        },
        name="dog",
    )
    assert len(shown.report.ignored) == 2
    assert all("Z-Image Omni" in reason for reason in shown.report.ignored.values())
