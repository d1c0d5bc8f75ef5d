"""FLUX.2 in the core: order of matrices, pictures that are shown, a cache that changes the tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny.networks import make_experts, randomise, run
from tiny.transformers import flux2_inputs, make_flux2, places
from torch import Tensor, nn

from mole_diffusion import MoLEConfig, RegionMaskError, inject
from mole_diffusion.core.bases import base_of_networks
from mole_diffusion.core.networks import map_network

from .test_invariants import FORMS, assert_close, differs, form_id
from .test_robustness import gradients


def test_matrices_run_in_the_order_of_the_table() -> None:
    network = make_flux2()
    layout = map_network(network)
    ran: list[str] = []
    for site in layout.sites:
        network.get_submodule(site.path).register_forward_hook(lambda *_, path=site.path: ran.append(path))
    run(network)
    assert ran == [site.path for site in layout.sites]
    assert {site.name for site in layout.sites} == {
        name for name, module in network.named_modules() if isinstance(module, nn.Linear)
    }
    base = base_of_networks({"transformer": network})
    assert base is not None
    assert base.family == "FLUX.2"


def with_reference(told: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with a picture of 2 x 3 tokens that is shown; pipelines number it 10."""
    shown = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(9))
    ids = nn.functional.pad(places(2, 3, picture=10), (0, 1))
    return {
        **told,
        "hidden_states": torch.cat([told["hidden_states"], shown], dim=1),
        "img_ids": torch.cat([told["img_ids"], ids]),
    }


@pytest.mark.parametrize("pooling", ["mean", "token"])
def test_tokens_of_shown_pictures_have_gates_and_no_regions(pooling: str) -> None:
    network = make_flux2()
    mixture = inject(network, make_experts(2, network), MoLEConfig(pooling=pooling))
    randomise(mixture)
    told: dict[str, Any] = with_reference(flux2_inputs(4, text=7))
    with torch.no_grad():
        free = network(**told).sample
        full = torch.ones(4, 4)
        mixture.activate(region_masks={"dog": full, "cat": full})
        assert_close(network(**told).sample, free)
        left = torch.zeros(4, 4)
        left[:, :2] = 1
        mixture.activate(region_masks={"dog": left, "cat": 1 - left})
        assert differs(network(**told).sample, free)
    image = mixture._context.values["single_transformer_blocks.1"]
    assert image.joint is not None
    owners = torch.tensor([0, 0, 1, 1, 1])
    for weights, _ in image.joint[1].values():
        drawn = weights[:, 7:23].view(2, 4, 4, 5)
        assert torch.all(drawn[:, :, :2][..., owners == 1] == 0)
        assert torch.all(drawn[:, :, 2:][..., owners == 0] == 0)
        assert torch.all(weights[:, 23:] > 0)


def test_regions_are_refused_where_a_cache_takes_tokens_away() -> None:
    """klein's: pictures that are shown stand in front of the first step, and are gone in the next."""
    network = make_flux2()
    mixture = inject(network, make_experts(2, network), MoLEConfig())
    randomise(mixture)
    told: dict[str, Any] = flux2_inputs(4, text=7)
    mixture.activate(region_masks={"dog": torch.ones(4, 4)})
    with pytest.raises(RegionMaskError, match="need the latent's size"), torch.no_grad():
        network(**told, kv_cache_mode="extract", num_ref_tokens=4)


@pytest.mark.parametrize("form", [form for form in FORMS if form.pooling != "flatten"], ids=form_id)
def test_gradient_checkpointing(form: MoLEConfig) -> None:
    network = make_flux2().requires_grad_(False)
    mixture = inject(network, make_experts(3, network), form)
    randomise(mixture)
    expected = gradients(network, mixture)
    network.train().enable_gradient_checkpointing()
    for found, wanted in zip(gradients(network, mixture), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)
    assert any(gradient.abs().max() > 0 for gradient in expected)
