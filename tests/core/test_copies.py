"""What a mixture keeps on devices: told before it is made, and made before it is needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny.networks import make_clip, make_experts, make_unet, randomise, run
from tiny.transformers import make_flux, make_krea2
from torch import Tensor, nn

from mole_diffusion import Mixture, MoLEConfig, inject
from mole_diffusion.core.functional import RootBlocks
from mole_diffusion.core.matrices import MatrixPlan
from mole_diffusion.core.ranks import GateFactors, SharedDown

NETWORKS = {"unet": make_unet, "clip": make_clip, "flux": make_flux, "krea2": make_krea2}
FORMS = {
    "block": MoLEConfig(),
    "matrix, mean, own": MoLEConfig(granularity="matrix", pooling="mean", gate_input="own"),
    "hidden": MoLEConfig(gate_input="hidden"),
    "fresh": MoLEConfig.uniform(),
}


def kept(mixture: Mixture) -> dict[int, Tensor]:
    """Large tensors in its caches."""
    found: list[Any] = []
    for bundle in mixture._bundles:
        found += [plan for plans in bundle._plans._kept.values() for plan in plans.values()]
        for slot in bundle.slots:
            found += [plan for plans in slot.plans._kept.values() for plan in plans.values()]
            found += slot.cache._values.values()
    for group in mixture.groups:
        found += [value for _, value in group.gate.cache._values.values()]
    return {value.data_ptr(): value for one in found for value in tensors(one) if value.numel() > 1}


def tensors(kind: Any) -> list[Tensor]:
    if isinstance(kind, Tensor):
        return [kind]
    if isinstance(kind, MatrixPlan):
        return [] if kind.up is None else [kind.up]
    if isinstance(kind, SharedDown):
        return [kind.down, *([] if kind.offset is None else [kind.offset])]
    if isinstance(kind, GateFactors):
        root = (
            [kind.root]
            if isinstance(kind.root, Tensor)
            else [one.blocks for one in kind.root if isinstance(one, RootBlocks)]
        )
        return [*kind.ups, *root, kind.owners]
    raise AssertionError(type(kind))


def size(mixture: Mixture) -> int:
    gates = sum(value.nbytes for value in mixture.gates.state_dict().values())
    return gates + sum(value.untyped_storage().nbytes() for value in kept(mixture).values())


def mixed(make: Any, form: MoLEConfig, *, fresh: bool) -> tuple[nn.Module, Mixture]:
    network = make()
    mixture = inject(network, make_experts(3, network), form)
    if not fresh:
        randomise(mixture)
    mixture.gates.requires_grad_(False)
    return network, mixture


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("form", FORMS)
def test_bytes_are_told_before_anything_is_made(name: str, form: str) -> None:
    network, mixture = mixed(NETWORKS[name], FORMS[form], fresh=form == "fresh")
    assert not mixture.copies.made
    told = mixture.copies.bytes(torch.float32)
    assert not mixture.copies.made
    run(network)
    assert mixture.copies.made
    found = size(mixture)
    assert 0.9 * found <= told <= 1.15 * found
    mixture.activate(["dog"])
    assert mixture.copies.bytes(torch.float32) < told
    mixture.release()
    assert not mixture.copies.made


@pytest.mark.parametrize("form", FORMS)
def test_forwards_need_nothing_more_than_what_was_made(form: str) -> None:
    network, mixture = mixed(make_unet, FORMS[form], fresh=form == "fresh")
    expected = run(network)
    mixture.release()
    mixture.copies.make(torch.device("cpu"), torch.float32)
    before = kept(mixture).keys()
    assert torch.equal(run(network), expected)
    projections = {
        value.data_ptr() for group in mixture.groups for _, value in group.gate.cache._values.values()
    }
    assert kept(mixture).keys() - projections == before


def test_half_as_many_bytes_in_half_precision_and_blocks_that_run_alone() -> None:
    network, mixture = mixed(make_unet, FORMS["fresh"], fresh=True)
    gates = sum(value.nbytes for value in mixture.gates.state_dict().values())
    whole, half = (mixture.copies.bytes(dtype) - gates for dtype in (torch.float32, torch.bfloat16))
    assert half * 2 == whole
    mixture.eject()
    outputs = MoLEConfig(composition="output", gate_input="experts")
    mixture = inject(network, make_experts(3, network), outputs)
    alone = [slot for group in mixture.groups if group.block is not None for slot in group.slots]
    mixture.copies.make(torch.device("cpu"), torch.float32)
    assert alone
    assert not any(slot.keeps for slot in alone)
    run(network)
    assert all(slot.keeps for slot in alone)
