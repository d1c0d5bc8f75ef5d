"""What holds for every diffusion transformer: order of matrices, its family, gradient checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny.networks import make_experts, randomise, run
from tiny.transformers import make_anima, make_flux, make_flux2, make_krea2, make_qwen_image, make_z_image
from torch import nn

from mole_diffusion import MoLEConfig, inject
from mole_diffusion.core.bases import base_of_networks
from mole_diffusion.core.networks import map_network

from .test_invariants import FORMS, form_id
from .test_robustness import gradients

FAMILIES: dict[str, Callable[[], Any]] = {
    "FLUX.1": make_flux,
    "FLUX.2": make_flux2,
    "Qwen-Image": make_qwen_image,
    "Krea 2": make_krea2,
    "Z-Image": make_z_image,
    "Anima": make_anima,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_run_in_the_order_of_the_table(family: str) -> None:
    network = FAMILIES[family]()
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
    assert base.family == family


def _learning(family: str) -> list[MoLEConfig]:
    """Forms whose gates all have a way to the picture: not the small ones of Qwen-Image's last block."""
    forms = [form for form in FORMS if form.pooling != "flatten"]
    if family == "Qwen-Image":
        return [form for form in forms if form.granularity in ("block", "network")]
    return forms


# diffusers' Anima has no gradient checkpointing.
@pytest.mark.parametrize(
    ("family", "form"),
    [
        pytest.param(
            *(family, form),
            id=f"{family}-{form_id(form)}",
            # The hooks are those of FLUX.1, which tries every form; the others the default and a pooled one.
            marks=() if family == "FLUX.1" or form in (FORMS[2], FORMS[8]) else pytest.mark.slow,
        )
        for family in FAMILIES
        if family != "Anima"
        for form in _learning(family)
    ],
)
def test_gradient_checkpointing(family: str, form: MoLEConfig) -> None:
    network = FAMILIES[family]().requires_grad_(False)
    mixture = inject(network, make_experts(3, network), form)
    randomise(mixture)
    expected = gradients(network, mixture)
    network.train().enable_gradient_checkpointing()
    for found, wanted in zip(gradients(network, mixture), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)
    assert any(gradient.abs().max() > 0 for gradient in expected)
