"""What holds on the CPU holds on a GPU, in every data type; PEFT and the CPU in float32 are the oracles."""

from __future__ import annotations

import copy

import pytest
import torch
from core.test_invariants import FORMS, form_id
from gpu_tools import NETWORKS, assert_close, differs, places, run_on
from tiny.networks import (
    active_weights,
    lora_state,
    make_experts,
    make_unet,
    part_of,
    randomise,
    states,
    to_experts,
    with_peft,
)
from torch import nn

from mole_diffusion import MoLEConfig, inject
from mole_diffusion.core.functional import balance_loss

CPU = torch.device("cpu")
forms = pytest.mark.parametrize("form", FORMS, ids=form_id)
networks = pytest.mark.parametrize("kind", NETWORKS)


def sizes(network: nn.Module) -> tuple[int, int] | int:
    return 12 if part_of(network) == "text_encoder" else (8, 8)


@networks
@places
@pytest.mark.parametrize("count", [1, 3])
def test_fresh_gates_are_nla(kind: str, count: int, device: torch.device, dtype: torch.dtype) -> None:
    network = NETWORKS[kind]()
    loras = states(count, network)
    expected = run_on(with_peft(network, loras, dict.fromkeys(loras, 1 / count)), CPU)
    network.to(device, dtype)
    base = run_on(network, device)
    inject(network, to_experts(loras, part_of(network)), MoLEConfig(strength=1.0))
    found = run_on(network, device)
    assert differs(found, base)
    assert_close(found, expected, dtype)


@forms
@places
def test_trained_gates_say_what_they_say_on_the_cpu(
    form: MoLEConfig, device: torch.device, dtype: torch.dtype
) -> None:
    """The base, all experts, one alone, and the base again, bitwise."""
    network = make_unet()
    loras = states(3, network)
    outputs = []
    for where, kind in ((CPU, torch.float32), (device, dtype)):
        network = make_unet().to(where, kind)
        base = run_on(network, where)
        mixture = inject(network, to_experts(loras, "unet"), form, flatten_tokens=sizes(network))
        randomise(mixture)
        mixed = run_on(network, where)
        assert all(p.dtype == torch.float32 for p in mixture.parameters())
        assert all(w.dtype == torch.float32 for w in mixture.live_weights().values())
        mixture.activate(["cat"], expert_scales={"cat": 0.7})
        outputs.append((mixed, run_on(network, where)))
        mixture.eject()
        assert torch.equal(run_on(network, where), base)
    for found, expected in zip(outputs[1], outputs[0], strict=True):
        assert_close(found, expected, dtype)
    alone = run_on(with_peft(make_unet(), {"cat": loras["cat"]}, {"cat": 0.7}), CPU)
    assert_close(outputs[1][1], alone, dtype)
    assert differs(*outputs[1])


@networks
@places
def test_fixed_weights_equal_merged_weights(kind: str, device: torch.device, dtype: torch.dtype) -> None:
    network = NETWORKS[kind]()
    loras = states(3, network)
    weights = {name: 0.2 + 0.1 * i for i, name in enumerate(loras)}
    merged = copy.deepcopy(network)
    with torch.no_grad():
        for name, state in loras.items():
            for key in [key for key in state if "lora_A" in key]:
                down, up = state[key], state[key.replace("lora_A", "lora_B")]
                weight = merged.get_submodule(key.split(".lora_")[0]).weight
                weight += weights[name] * (up.flatten(1) @ down.flatten(1)).view_as(weight)
    network.to(device, dtype)
    mixture = inject(network, to_experts(loras, part_of(network)), MoLEConfig())
    mixture.activate(weights=weights)
    assert_close(run_on(network, device), run_on(merged, CPU), dtype)


@places
@pytest.mark.parametrize("linear", [True, False])
def test_regions(linear: bool, device: torch.device, dtype: torch.dtype) -> None:
    left, right = torch.zeros(2, 64, 64)
    left[:, :32], right[:, 32:] = 1.0, 1.0
    outputs = []
    for where, kind in ((CPU, torch.float32), (device, dtype)):
        unet = make_unet(linear=linear).to(where, kind)
        mixture = inject(unet, make_experts(3, unet), MoLEConfig())
        randomise(mixture)
        free = run_on(unet, where)
        mixture.activate(region_masks={"dog": left.to(where), "cat": right})
        outputs.append(run_on(unet, where))
    assert differs(outputs[1], free)
    assert_close(outputs[1], outputs[0], dtype)


@forms
def test_a_batch_of_two_is_two_singles(form: MoLEConfig, device: torch.device) -> None:
    unet = make_unet().to(device)
    mixture = inject(unet, make_experts(3, unet), form)
    randomise(mixture)
    assert_close(run_on(unet, device)[:1], run_on(unet, device, batch=1))


@forms
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_cpu(form: MoLEConfig, checkpointing: bool, device: torch.device) -> None:
    gradients = []
    for where, recompute in ((CPU, False), (device, checkpointing)):
        unet = make_unet().to(where).train().requires_grad_(False)
        if recompute:
            unet.enable_gradient_checkpointing()
        mixture = inject(unet, make_experts(3, unet), form)
        randomise(mixture)
        (run_on(unet, where, grad=True).square().mean() + balance_loss(active_weights(mixture))).backward()
        gradients.append([parameter.grad for parameter in mixture.parameters()])
    for found, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=5e-3, atol=1e-5)
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients[0])


@networks
@pytest.mark.parametrize("moved_first", [True, False])
def test_gates_live_where_the_network_runs(kind: str, moved_first: bool, device: torch.device) -> None:
    """And stay the same parameters, for optimisers that hold them."""
    network = NETWORKS[kind]()
    if moved_first:
        network.to(device)
    mixture = inject(network, make_experts(2, network), MoLEConfig(timestep=True))
    network.to(device)
    before = [id(parameter) for parameter in mixture.parameters()]
    run_on(network, device)
    assert {tensor.device.type for tensor in mixture.gates.state_dict().values()} == {device.type}
    assert [id(parameter) for parameter in mixture.parameters()] == before


@places
def test_sixteen_experts(device: torch.device, dtype: torch.dtype) -> None:
    outputs = []
    for where, kind in ((CPU, torch.float32), (device, dtype)):
        unet = make_unet().to(where, kind)
        loras = {f"expert{i}": lora_state(unet, 2 + i % 3, i) for i in range(16)}
        mixture = inject(unet, to_experts(loras, "unet"), MoLEConfig())
        randomise(mixture)
        outputs.append(run_on(unet, where))
    assert_close(outputs[1], outputs[0], dtype)
