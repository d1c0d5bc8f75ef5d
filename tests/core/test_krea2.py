"""Krea 2 in the core: text over layers and over words, padding, regions in one sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from tiny.networks import make_experts, randomise, run
from tiny.transformers import krea2_inputs, make_krea2, places
from torch import Tensor

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


class AsComfyUI:
    """Runs the network of diffusers as ComfyUI runs its own: whole latents, texts with their layers in a row,
    perhaps pictures that are shown, and the last matrix on text and image.
    """

    def __init__(self, network: Any) -> None:
        self.network = network
        network.forward = self.forward

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        ref_latents: list[Tensor] | None = None,
        ref_latents_method: str | None = None,
    ) -> Tensor:
        shown = ref_latents if ref_latents is not None and ref_latents_method is not None else []
        image = torch.cat([pack(one) for one in (x, *shown)], dim=1)
        ids = [
            places(one.shape[-2] // 2, one.shape[-1] // 2, number) for number, one in enumerate((x, *shown))
        ]
        found: Tensor = (
            type(self.network)
            .forward(
                self.network,
                hidden_states=image,
                encoder_hidden_states=context.unflatten(2, (3, -1)),
                timestep=timesteps,
                position_ids=torch.cat([torch.zeros(context.shape[1], 3), *ids]),
            )
            .sample
        )
        return found[:, : image.shape[1] - sum(pack(one).shape[1] for one in shown)]

    def last_reads_text(self, text: int) -> None:
        """Behind the hooks of a mixture."""
        last = self.network.final_layer.linear
        last.register_forward_pre_hook(
            lambda _, args: torch.cat([args[0].new_ones(2, text, args[0].shape[-1]), args[0]], dim=1)
        )
        last.register_forward_hook(lambda _, args, output: output[:, text:])


def pack(latents: Tensor) -> Tensor:
    batch, channels, height, width = latents.shape
    packed: Tensor = FluxPipeline._pack_latents(latents, batch, channels, height, width)
    return packed


@forms
def test_gates_are_the_same_where_the_last_matrix_reads_text_too(form: MoLEConfig) -> None:
    told = {**krea2_inputs(), "encoder_attention_mask": None}
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    told["hidden_states"] = pack(latents)
    network, twin = make_krea2(), make_krea2()
    native = AsComfyUI(twin)
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    chosen: list[dict[str, Any]] = [{}, {"region_masks": {"dog": left}}]
    mixtures = [inject(one, make_experts(3, network), form) for one in (network, twin)]
    for mixture in mixtures:
        randomise(mixture)
    native.last_reads_text(12)
    inputs = latents, told["timestep"], told["encoder_hidden_states"].flatten(2)
    with torch.no_grad():
        for choice in chosen:
            for mixture in mixtures:
                mixture.activate(**choice)
            expected = network(**told).sample
            assert_close(twin(*inputs), expected)
            ours, theirs = (mixture.live_weights() for mixture in mixtures)
            for label in ours:
                torch.testing.assert_close(ours[label], theirs[label], rtol=1e-4, atol=1e-6)
        # Pictures that are shown have gates, no regions, and do not count in means.
        shown = {"ref_latents": [latents[:, :, :4]], "ref_latents_method": "index"}
        assert twin(*inputs, **shown).shape == expected.shape
        assert not torch.equal(twin(*inputs, **shown), expected)
        assert torch.equal(twin(*inputs, ref_latents=[latents]), twin(*inputs))
