"""Invariant 10: compilation, checkpointing, data types, offload, other LoRAs and hosts' habits."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
from accelerate import cpu_offload
from diffusers import UNet2DConditionModel
from peft import PeftModel
from tiny.networks import (
    LDMUNet,
    active_weights,
    lora_state,
    make_clip,
    make_experts,
    make_unet,
    randomise,
    run,
    states,
    to_experts,
    with_peft,
)
from torch import nn

from mole_diffusion import InjectionError, MoLEConfig, inject
from mole_diffusion.core.functional import balance_loss
from mole_diffusion.core.records import Recorder

from .test_invariants import FORMS, TOLERANCE, assert_close, differs, form_id

forms = pytest.mark.parametrize("form", FORMS, ids=form_id)
_DRAWS = torch.Generator().manual_seed(3)
LATENT_INPUTS = (
    torch.randn(2, 4, 8, 8, generator=_DRAWS),
    torch.tensor(500),
    torch.randn(2, 77, 16, generator=_DRAWS),
)


def gradients(network: nn.Module, mixture) -> list[torch.Tensor]:
    mixture.gates.zero_grad()
    (run(network, grad=True).square().mean() + balance(mixture)).backward()
    return [p.grad.clone() for p in mixture.parameters()]


def balance(mixture) -> torch.Tensor:
    return balance_loss(active_weights(mixture, range(len(mixture.experts))), normalised=True)


def run_latent(unet: nn.Module) -> torch.Tensor:
    """As `run`, for UNets that are wrapped or whose weights are elsewhere."""
    with torch.no_grad():
        return unet(*LATENT_INPUTS).sample


@pytest.mark.parametrize(
    ("linear", "form"),
    [
        pytest.param(
            *(linear, form),
            id=f"{linear}-{form_id(form)}",
            # Of convolutions the default and a pooled form: gates read the same tensors.
            marks=() if linear or form in (FORMS[2], FORMS[8]) else pytest.mark.slow,
        )
        for linear in (True, False)
        for form in FORMS
    ],
)
def test_gradient_checkpointing_sees_the_same_gates(form: MoLEConfig, linear: bool) -> None:
    unet = make_unet(linear=linear).train()
    unet.requires_grad_(False)
    mixture = inject(unet, make_experts(3, unet), form)
    randomise(mixture)
    expected = gradients(unet, mixture)
    unet.enable_gradient_checkpointing()
    recorder = Recorder()
    with recorder.watching({"unet": mixture}):
        found = gradients(unet, mixture)
    assert len(recorder.weights.records) == len(mixture.live_weights())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    assert any(g.abs().max() > 0 for g in expected)


def test_gradient_checkpointing_in_the_text_encoder(clip: nn.Module) -> None:
    clip.requires_grad_(False)
    mixture = inject(clip.train(), make_experts(3, clip), MoLEConfig())
    randomise(mixture)
    expected = gradients(clip, mixture)
    clip.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for one, other in zip(gradients(clip, mixture), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_checkpointing_two_forwards_where_it_cannot_work_says_so(unet: nn.Module) -> None:
    """A gate inside the checkpoint is recomputed from its own input; one outside cannot be."""
    unet.train().requires_grad_(False)
    experts = make_experts(2, unet)
    unet.enable_gradient_checkpointing()
    mixture = inject(unet, experts, MoLEConfig(granularity="network", pooling="mean"))
    randomise(mixture)
    losses = [run(unet, grad=True).square().mean() for _ in range(2)]
    with pytest.raises(InjectionError, match="2 forwards with gradient wait for a backward pass"):
        sum(losses).backward()
    losses.clear()
    run(unet, grad=True).square().mean().backward()
    mixture.eject()

    inner = {
        name: lora_state(unet, 2, seed, ("to_q", "ff.net.2")) for seed, name in enumerate(("dog", "cat"))
    }
    mixture = inject(unet, to_experts(inner, "unet"), MoLEConfig())
    randomise(mixture)
    once = gradients(unet, mixture)
    mixture.gates.zero_grad()
    sum(run(unet, grad=True).square().mean() + balance(mixture) for _ in range(2)).backward()
    for parameter, gradient in zip(mixture.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "form",
    [pytest.param(form, marks=pytest.mark.slow) for form in (FORMS[2], FORMS[6], FORMS[7])],
    ids=form_id,
)
def test_a_compiled_text_encoder_gives_the_same_output(form: MoLEConfig, clip: nn.Module) -> None:
    mixture = inject(clip, make_experts(2, clip), form)
    randomise(mixture)
    ids = torch.randint(3, 64, (2, 12))
    torch._dynamo.reset()
    compiled = torch.compile(clip, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for active in (None, None, ["cat"]):
            mixture.activate(active)
            expected = clip(ids).last_hidden_state
            assert_close(compiled(ids).last_hidden_state, expected)
    torch._dynamo.reset()


@pytest.mark.slow  # tests/gpu/test_gpu_hosts.py compiles the same blocks in bfloat16
def test_compiled_blocks_of_a_unet_give_the_same_output(unet: nn.Module) -> None:
    mixture = inject(unet, make_experts(2, unet), MoLEConfig())
    randomise(mixture)
    expected = run(unet)
    torch._dynamo.reset()
    unet.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    assert_close(run(unet), expected)
    torch._dynamo.reset()


def test_a_compiled_block_knows_which_experts_are_active_now(unet: nn.Module) -> None:
    mixture = inject(unet, make_experts(3, unet), MoLEConfig())
    randomise(mixture)
    choices = (None, ["cat", "boot"], ["dog"], None)
    expected = []
    for active in choices:
        mixture.activate(active)
        expected.append(run(unet))
    torch._dynamo.reset()
    unet.down_blocks[0].attentions[0].transformer_blocks[0].compile(backend="eager", fullgraph=True)
    for active, wanted in zip(choices, expected, strict=True):
        mixture.activate(active)
        assert_close(run(unet), wanted)
    assert differs(expected[0], expected[1])
    assert differs(expected[1], expected[2])
    torch._dynamo.reset()


def left(columns: int) -> torch.Tensor:
    mask = torch.zeros(64, 64)
    mask[:, :columns] = 1
    return mask


def small_unet() -> UNet2DConditionModel:
    """Attention in the middle alone: compiling takes its time."""
    torch.manual_seed(1)
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    ).eval()


@pytest.mark.parametrize(
    ("network", "choices"),
    [
        (make_clip, [{"expert_scales": {"dog": scale}} for scale in (0.9, 0.8, 0.7, 1.6)]),
        (make_clip, [{"weights": {"dog": weight, "cat": 1 - weight}} for weight in (0.9, 0.8, 0.7, -0.1)]),
        (
            small_unet,
            [{"region_masks": {"dog": left(w)}, "expert_scales": {"cat": w / 8}} for w in (16, 24, 40, 56)],
        ),
    ],
    ids=["scales", "weights", "masks"],
)
def test_other_numbers_do_not_compile_a_network_anew(network, choices: list[dict]) -> None:
    """torch.compile gives a network up after eight compilations."""
    from torch._dynamo.testing import CompileCounter

    network = network()
    mixture = inject(network, make_experts(2, network), MoLEConfig())
    randomise(mixture)
    inputs = (torch.randint(3, 64, (2, 12)),) if mixture.part == "text_encoder" else LATENT_INPUTS
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(network, backend=counter)
    seen = []
    with torch.no_grad():
        for choice in choices:
            mixture.activate(**choice)
            expected, found = (one(*inputs, return_dict=False)[0] for one in (network, compiled))
            assert_close(found, expected)
            assert all(differs(found, other) for other in seen)
            seen.append(found)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(form: MoLEConfig, dtype: torch.dtype, unet: nn.Module) -> None:
    mixture = inject(unet, make_experts(3, unet), form)
    randomise(mixture)
    expected = run(unet)
    found = run(unet.to(dtype))
    assert found.dtype == dtype
    assert_close(found, expected, torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in mixture.parameters())


def test_autocast(unet: nn.Module) -> None:
    mixture = inject(unet, make_experts(3, unet), MoLEConfig())
    randomise(mixture)
    expected = run(unet)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(unet)
        run(unet, grad=True).square().mean().backward()
    assert_close(found, expected, torch.bfloat16)
    assert all(w.dtype == torch.float32 for w in mixture.live_weights().values())
    assert all(torch.isfinite(p.grad).all() for p in mixture.parameters())


@pytest.mark.parametrize("form", FORMS[-2:], ids=form_id)
def test_offloaded_weights(form: MoLEConfig) -> None:
    for before in (True, False):
        unet = make_unet()
        experts = make_experts(3, unet)
        expected_mixture = inject(unet, experts, form)
        randomise(expected_mixture)
        expected = run(unet)
        expected_mixture.eject()
        if before:
            cpu_offload(unet, torch.device("cpu"))
        mixture = inject(unet, experts, form)
        randomise(mixture)
        if not before:
            cpu_offload(unet, torch.device("cpu"))
        assert next(unet.parameters()).device.type == "meta"
        found = run_latent(unet)
        assert_close(found, expected)


@pytest.mark.parametrize("before", [True, False])
def test_a_second_lora_through_peft(before: bool, unet: nn.Module) -> None:
    """diffusers loads one LoRA, we mix three others: the same as PEFT with four; unloading is clean."""
    loras = states(3, unet)
    style = lora_state(unet, 2, 99)
    base = run(unet)
    expected = run(with_peft(unet, {**loras, "style": style}, {**dict.fromkeys(loras, 1 / 3), "style": 1.0}))
    with_style = run(with_peft(unet, {"style": style}, {"style": 1.0}))

    def load() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            unet.load_lora_adapter(dict(style), adapter_name="style", prefix=None)

    if before:
        load()
    mixture = inject(unet, to_experts(loras, "unet"), MoLEConfig(strength=1.0))
    if not before:
        load()
    assert_close(run(unet), expected)
    mixture.disable()
    assert_close(run(unet), with_style)
    mixture.enable()
    unet.disable_lora()
    nla = run(with_peft(make_unet(), loras, dict.fromkeys(loras, 1 / 3)))
    assert_close(run(unet), nla)
    unet.enable_lora()
    unet.unload_lora()
    assert_close(run(unet), nla)
    mixture.eject()
    assert torch.equal(run(unet), base)


def test_a_text_encoder_wrapped_by_peft(clip: nn.Module) -> None:
    loras = states(2, clip)
    expected = run(with_peft(clip, loras, dict.fromkeys(loras, 0.5)))
    wrapped = with_peft(clip, {"other": lora_state(clip, 2, 5)}, {"other": 0.0})
    assert not isinstance(wrapped, PeftModel)
    inject(wrapped, to_experts(loras, "text_encoder"), MoLEConfig())
    assert_close(run(wrapped), expected)


@forms
def test_inference_mode_first_and_training_afterwards(form: MoLEConfig, unet: nn.Module) -> None:
    """ComfyUI's executor runs everything under inference mode; what is kept there must stay trainable."""
    with torch.inference_mode():
        mixture = inject(unet, make_experts(2, unet), form)
        run_latent(unet)
    unet.requires_grad_(False)
    randomise(mixture)
    assert all(g is not None for g in gradients(unet, mixture))


@pytest.mark.parametrize("composition", ["delta", "output"])
def test_blocks_that_change_their_input_in_place(composition: str) -> None:
    """Forge's blocks do."""
    config = MoLEConfig(composition=composition)
    expected = None
    for in_place in (False, True):
        ldm = LDMUNet(make_unet())
        mixture = inject(ldm, make_experts(3, make_unet()), config)
        randomise(mixture)
        if in_place:
            for module in ldm.modules():
                if type(module).__name__ == "BasicTransformerBlock":
                    spoil(module)
        found = run(ldm)
        if expected is not None:
            assert_close(found, expected)
        expected = found


def spoil(block: nn.Module) -> None:
    original = block.forward

    def forward(hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        output = original(hidden_states, *args, **kwargs)
        hidden_states.zero_()
        return output

    block.forward = forward


def test_nothing_is_kept_alive_after_eject() -> None:
    unet = make_unet()
    mixture = inject(unet, make_experts(2, unet), MoLEConfig(composition="output"))
    run(unet)
    mixture.eject()
    watched = weakref.ref(unet), weakref.ref(mixture)
    del unet, mixture
    gc.collect()
    assert [ref() for ref in watched] == [None, None]


def test_tolerances_can_fail(unet: nn.Module) -> None:
    """The comparison used in all these tests tells different mixtures apart in every data type."""
    mixture = inject(unet, make_experts(3, unet), MoLEConfig())
    nla = run(unet)
    mixture.activate(["dog"])
    assert differs(run(unet), nla)
    for dtype in TOLERANCE:
        with pytest.raises(AssertionError):
            assert_close(run(unet), nla, dtype)


def test_released_factors_are_made_again() -> None:
    unet = make_unet()
    mixture = inject(unet, make_experts(3, unet), MoLEConfig())
    randomise(mixture)
    expected = run(unet)
    caches = [slot.cache for group in mixture.groups for slot in group.slots]
    assert any(cache._values for cache in caches)
    mixture.release()
    assert not any(cache._values for cache in caches)
    assert torch.equal(run(unet), expected)
