"""FLUX.2 in the core: pictures that are shown, a cache that changes the tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny.networks import make_experts, randomise
from tiny.transformers import flux2_inputs, make_flux2, places
from torch import Tensor, nn

from mole_diffusion import MoLEConfig, RegionMaskError, inject

from .test_invariants import assert_close, differs


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
