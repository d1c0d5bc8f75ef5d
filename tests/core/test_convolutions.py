"""Experts with convolutions: trained gates, files, block outputs, compiling, checkpointing; DoRA's scale."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny.networks import make_unet, randomise, run, with_peft
from torch import Tensor, nn

from mole_diffusion import Expert, Mixture, MoLEConfig, inject, load_gates, save_gates

from .test_invariants import assert_close, differs
from .test_lycoris import dora, expert_of, locon_state, merged

FORMS = [
    MoLEConfig(),
    MoLEConfig(pooling="mean", gate_input="hidden"),
    MoLEConfig(granularity="matrix"),
    MoLEConfig(granularity="network", pooling="mean"),
]


def form_id(form: MoLEConfig) -> str:
    return f"{form.granularity}-{form.pooling}-{form.gate_input}"


def experts(unet: nn.Module) -> list:
    return [expert_of(locon_state(unet, seed), name) for seed, name in enumerate(("dog", "cat", "boot"))]


def attached(unet: nn.Module, form: MoLEConfig) -> Mixture:
    mixture = inject(unet, experts(unet), form)
    randomise(mixture)
    return mixture


def gradients(unet: nn.Module, mixture: Mixture) -> dict[str, Tensor]:
    for parameter in mixture.parameters():
        parameter.grad = None
    run(unet, grad=True).square().mean().backward()
    return {name: p.grad.clone() for name, p in mixture.gates.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("form", FORMS, ids=form_id)
def test_every_gate_learns(form: MoLEConfig, unet: UNet2DConditionModel) -> None:
    mixture = attached(unet, form)
    unet.requires_grad_(False)
    found = gradients(unet, mixture)
    assert set(found) == {name for name, _ in mixture.gates.named_parameters()}
    assert all(value.abs().sum() > 0 for value in found.values())
    kinds = {matrix.split(".")[-1] for group in mixture.groups for matrix in group.matrices}
    assert {"conv1", "conv2", "time_emb_proj", "conv_in", "conv_out", "conv"} <= kinds


@pytest.mark.parametrize("form", FORMS, ids=form_id)
def test_trained_gates_survive_a_file(form: MoLEConfig, unet: UNet2DConditionModel, tmp_path: Path) -> None:
    mixture = attached(unet, form)
    expected = run(unet)
    save_gates(tmp_path / "gates.safetensors", {"unet": mixture})
    other = make_unet()
    fresh = inject(other, experts(other), form)
    assert differs(run(other), expected)
    load_gates(tmp_path / "gates.safetensors", {"unet": fresh})
    assert torch.equal(run(other), expected)


def test_block_outputs_with_convolutions(unet: UNet2DConditionModel) -> None:
    """Transformer blocks run once per expert; what lies outside of them mixes deltas."""
    before = run(unet)
    state = locon_state(unet, 0)
    alone = run(with_peft(unet, {"dog": state}, {"dog": 1.0}))
    mixture = attached(unet, MoLEConfig(composition="output"))
    together = run(unet)
    mixture.activate(["dog"])
    assert_close(run(unet), alone)
    mixture.activate()
    torch.testing.assert_close(run(unet), together, rtol=0, atol=0)
    unet.requires_grad_(False)
    assert all(
        value.isfinite().all() and value.abs().sum() > 0 for value in gradients(unet, mixture).values()
    )
    mixture.eject()
    torch.testing.assert_close(run(unet), before, rtol=0, atol=0)


@pytest.mark.parametrize("composition", ["delta", "output"])
def test_gradient_checkpointing_gives_the_same_gradients(
    composition: str, unet: UNet2DConditionModel
) -> None:
    mixture = attached(unet, MoLEConfig(composition=composition))
    unet.requires_grad_(False)
    unet.train()
    expected = gradients(unet, mixture)
    unet.enable_gradient_checkpointing()
    found = gradients(unet, mixture)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert_close(value, expected[name])


def test_compiled(unet: UNet2DConditionModel) -> None:
    """One level, with its residual blocks, transformers and sampler: the whole takes long to compile."""
    attached(unet, MoLEConfig())
    expected = run(unet)
    unet.down_blocks[0].compile(backend="eager")
    assert_close(run(unet), expected)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_close(run(unet), expected)
    torch.compiler.reset()


def test_scale_of_a_dora_is_a_share_of_its_change(unet: UNet2DConditionModel) -> None:
    """At scale s the weight is W + s (W' - W), with W' the DoRA's weight: ComfyUI's `strength`.

    PEFT puts s on the low-rank product before it normalises, which is another weight between (and beyond)
    the ends: at 0 it is the DoRA of no product, not the base.
    """
    state, expected = dora(unet)
    alphas = {f"{key[: -len('.lora_A.weight')]}.alpha": torch.tensor(4.0) for key in state if "lora_A" in key}
    base = run(unet)
    expert = Expert.from_state_dict(state | alphas, name="dog")
    mixture = inject(unet, [expert], MoLEConfig())
    assert_close(run(unet), expected)
    deltas = {}
    for group in mixture.groups:
        for slot in group.slots:
            pair = slot.factors[0]
            deltas[slot.name] = pair.matrices[1] @ pair.matrices[0] * pair.scaling * 0.4
    mixture.activate(expert_scales={"dog": 0.4})
    found = run(unet)
    mixture.activate(expert_scales={"dog": 0.0})
    assert_close(run(unet), base)
    mixture.eject()
    shaped = {name: delta.view_as(unet.get_submodule(name).weight) for name, delta in deltas.items()}
    assert_close(found, merged(unet, shaped))
