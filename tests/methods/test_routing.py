"""LoRA-Switch and LoRA-Composite against loops written out by hand with diffusers and PEFT."""

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HeunDiscreteScheduler

from mole_diffusion.core.errors import AllExpertsMaskedError, NoExpertsError, UnknownExpertError

NAMES = ["boot", "cat", "clock"]
PROMPT = "a zorin boot a vim cat a kipra clock"
CLOSE = {"atol": 2e-4, "rtol": 0.0}
GUIDANCE, STEPS = 3.0, 4


def adapters(plain: Any, lora_files: dict[str, Path]) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        for name, path in lora_files.items():
            plain.load_lora_weights(path, adapter_name=name)
    return plain


def start(plain: Any) -> torch.Tensor:
    shape = (1, 4, plain.unet.config.sample_size, plain.unet.config.sample_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def by_hand(plain: Any, text_adapters: list[str], experts_of_step: Any) -> torch.Tensor:
    """Latents of a loop in which every step averages the guided predictions of some experts."""
    plain.set_adapters(text_adapters, [1.0] * len(text_adapters))
    text, empty = plain.encode_prompt(PROMPT, "cpu", 1, True)
    plain.scheduler.set_timesteps(STEPS)
    latents = start(plain)
    for index, timestep in enumerate(plain.scheduler.timesteps):
        guided = []
        for name in experts_of_step(index):
            plain.set_adapters([name], [1.0])
            without = plain.unet(latents, timestep, encoder_hidden_states=empty).sample
            with_text = plain.unet(latents, timestep, encoder_hidden_states=text).sample
            guided.append(without + GUIDANCE * (with_text - without))
        prediction = torch.stack(guided).mean(dim=0)
        latents = plain.scheduler.step(prediction, timestep, latents).prev_sample
    return latents


def latents_of(draw: Any, pipe: Any, **kwargs: Any) -> torch.Tensor:
    return draw(pipe, output_type="latent", num_inference_steps=STEPS, guidance_scale=GUIDANCE, **kwargs)


def test_switch_is_one_expert_per_step_and_the_first_in_the_text_encoder(pipe, plain, draw, lora_files):
    adapters(plain, lora_files)
    expected = by_hand(plain, ["boot"], lambda index: [NAMES[index % 3]])
    torch.testing.assert_close(latents_of(draw, pipe, mixture="switch"), expected, **CLOSE)
    # The text encoder is not a detail: with all experts in it, or another one first, latents differ.
    other = by_hand(plain, NAMES, lambda index: [NAMES[index % 3]])
    assert (other - expected).abs().max() > 0.01


def test_switch_follows_the_order_of_the_active_experts(pipe, plain, draw, lora_files) -> None:
    adapters(plain, lora_files)
    order = ["cat", "boot"]
    expected = by_hand(plain, ["cat"], lambda index: [order[index % 2]])
    found = latents_of(draw, pipe, mixture="switch", active_experts=order)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_composite_is_the_mean_of_the_guided_predictions(pipe, plain, draw, lora_files) -> None:
    adapters(plain, lora_files)
    expected = by_hand(plain, NAMES, lambda index: NAMES)
    torch.testing.assert_close(latents_of(draw, pipe, mixture="composite"), expected, **CLOSE)


@pytest.mark.parametrize("mixture", ["switch", "composite"])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_of_one_expert_it_is_that_expert(pipe, plain, draw, lora_files, mixture, rescale) -> None:
    adapters(plain, lora_files).set_adapters(["cat"], [1.0])
    expected = draw(plain, guidance_rescale=rescale)
    found = draw(pipe, mixture=mixture, active_experts=["cat"], guidance_rescale=rescale)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("mixture", ["switch", "composite"])
def test_scales_count(pipe, plain, draw, lora_files, mixture) -> None:
    adapters(plain, lora_files).set_adapters(["cat"], [0.5])
    found = draw(pipe, mixture=mixture, active_experts=["cat"], expert_scales={"cat": 0.5})
    torch.testing.assert_close(found, draw(plain), **CLOSE)


@pytest.mark.parametrize("mixture", ["switch", "composite"])
def test_region_masks_count(pipe, draw, mixture) -> None:
    nowhere = {name: torch.zeros(32, 32) for name in NAMES}
    everywhere = {name: torch.ones(32, 32) for name in NAMES}
    plain_switch = draw(pipe, mixture=mixture)
    torch.testing.assert_close(draw(pipe, mixture=mixture, region_masks=everywhere), plain_switch, **CLOSE)
    assert (draw(pipe, mixture=mixture, region_masks=nowhere) - plain_switch).abs().max() > 0.01


def test_schedulers_of_second_order_keep_an_expert_for_a_step(pipe, draw) -> None:
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    seen = []
    handle = pipe.unet.register_forward_hook(
        lambda *_: seen.append(pipe.mixtures["unet"]._context.activation.active)
    )
    draw(pipe, mixture="switch", num_inference_steps=4)
    handle.remove()
    assert seen == [(0,), (0,), (1,), (1,), (2,), (2,), (0,)]


@pytest.mark.parametrize("mixture", ["switch", "composite"])
def test_nothing_remains(pipe, draw, mixture) -> None:
    before = draw(pipe)
    hooks = len(pipe.unet._forward_hooks), len(pipe.unet._forward_pre_hooks)

    def fail(*_: Any) -> dict[str, Any]:
        raise RuntimeError("callback")

    draw(pipe, mixture=mixture)
    torch.testing.assert_close(draw(pipe), before, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="callback"):
        draw(pipe, mixture=mixture, callback_on_step_end=fail)
    torch.testing.assert_close(draw(pipe), before, rtol=0, atol=0)
    assert (len(pipe.unet._forward_hooks), len(pipe.unet._forward_pre_hooks)) == hooks
    assert sys.exc_info() == (None, None, None)


def test_refusals(pipe, empty, draw) -> None:
    with pytest.raises(UnknownExpertError, match="'dog'"):
        draw(pipe, mixture="switch", active_experts=["dog"])
    with pytest.raises(AllExpertsMaskedError):
        draw(pipe, mixture="composite", active_experts=[])
    pipe.eject()
    with pytest.raises(NoExpertsError):
        draw(pipe, mixture="switch")
