"""Styles and subjects in balance in denoising transformers, whose predictions have other forms."""

from __future__ import annotations

from dataclasses import replace

import torch
from tiny.networks import randomise

from mole_diffusion.core.balancing import Lead, balanced
from mole_diffusion.core.gated_balance import GATED_BALANCE, Styled
from mole_diffusion.core.laid_out import on_grid
from mole_diffusion.core.predictions import by_place, like_prediction

from .test_auto_transformers import drawn, families, mixed, run, timed


@families
def test_trained_gates_lead_on_what_falls_behind(name: str) -> None:
    network, given = drawn(name)
    mixture, given = mixed(network), timed(given, 0.75)
    randomise(mixture)
    style = mixture.expert_names[2]
    mixture.activate(styled=Styled((style,), GATED_BALANCE))
    found = run(network, given)
    mixture.activate()
    nobody = run(network, given)
    assert not torch.allclose(found, nobody, atol=1e-3)
    mixture.activate(styled=Styled((style,)))
    # Where text and image are in one sequence, it is not done unasked.
    assert torch.equal(run(network, given), nobody) == (name != "CosmosTransformer3DModel")
    mixture.activate()
    run(network, given)
    places, context = mixture.live_map(), mixture._context
    assert places is not None
    without = {}
    for left, scales in (("subjects", [0.0, 0.0, 1.0]), ("styles", [1.0, 1.0, 0.0])):
        context.activation = replace(context.activation, scales=torch.tensor(scales))
        without[left] = by_place(run(network, given))
    all_ = by_place(nobody)
    grid = context.token_grid(all_.shape[1]) if nobody.dim() == 3 else tuple(nobody.shape[-2:])
    weights = on_grid(places, *grid) * torch.tensor([1.0, 1.0, 0.0])
    led = balanced(all_, lambda left: without[left], weights, Lead(GATED_BALANCE, style=2.25))
    torch.testing.assert_close(found, like_prediction(led, nobody), atol=1e-4, rtol=1e-3)
    # Later nothing is changed.
    given = timed(given, 0.3)
    mixture.activate()
    nobody = run(network, given)
    mixture.activate(styled=Styled((style,), GATED_BALANCE))
    torch.testing.assert_close(run(network, given), nobody)
