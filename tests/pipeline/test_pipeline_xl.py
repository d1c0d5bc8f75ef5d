"""SDXL: three networks through the whole pipeline, against diffusers' and PEFT's adapters."""

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from pipeline_helpers import CLOSE, build, train_a_little, with_adapters

from mole_diffusion import MoLEConfig, StableDiffusionXLMoLEPipeline

NAMES = ["boot", "cat"]
PARTS = ["unet", "text_encoder", "text_encoder_2"]


def test_no_experts_is_the_plain_pipeline(xl_components, xl_plain, draw) -> None:
    pipe = build(StableDiffusionXLMoLEPipeline, xl_components)
    torch.testing.assert_close(draw(pipe), draw(xl_plain), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_one_active_expert_is_that_lora(xl_loaded, xl_plain, draw, xl_lora_files, name) -> None:
    train_a_little(xl_loaded)
    base = draw(xl_plain)
    expected = draw(with_adapters(xl_plain, xl_lora_files, {name: 1.0}))
    assert (expected - base).abs().max() > 0.05
    torch.testing.assert_close(draw(xl_loaded, active_experts=[name]), expected, **CLOSE)


@pytest.mark.parametrize(
    ("mixture", "weights"),
    [("la", {"boot": 1.0, "cat": 1.0}), ("nla", {"boot": 0.5, "cat": 0.5}), ({"cat": -0.4}, {"cat": -0.4})],
    ids=["la", "nla", "weights"],
)
def test_fixed_mixture_is_set_adapters(xl_loaded, xl_plain, draw, xl_lora_files, mixture, weights) -> None:
    train_a_little(xl_loaded)
    expected = draw(with_adapters(xl_plain, xl_lora_files, weights))
    torch.testing.assert_close(draw(xl_loaded, mixture=mixture), expected, **CLOSE)


def test_fresh_gates_of_strength_one_are_nla(xl_loaded, xl_plain, draw, xl_lora_files) -> None:
    xl_loaded.configure(MoLEConfig(strength=1.0))
    expected = draw(with_adapters(xl_plain, xl_lora_files, dict.fromkeys(NAMES, 0.5)))
    torch.testing.assert_close(draw(xl_loaded, mixture="gates"), expected, **CLOSE)


def test_gates_of_all_networks_are_recorded_and_saved(
    xl_loaded, xl_components, draw, xl_lora_files, tmp_path
):
    train_a_little(xl_loaded)
    expected = draw(xl_loaded, negative_prompt="a clock")
    rows = xl_loaded.gate_weights()
    assert list(dict.fromkeys(row.network for row in rows)) == ["text_encoder", "text_encoder_2", "unet"]
    for part in PARTS:
        assert {row.branch for row in rows.where(network=part)} == {"prompt", "negative"}
    xl_loaded.save_gates(tmp_path / "gates.safetensors")
    other = build(StableDiffusionXLMoLEPipeline, xl_components)
    for name in reversed(NAMES):
        other.load_expert(xl_lora_files[name], name=name)
    other.load_gates(tmp_path / "gates.safetensors")
    torch.testing.assert_close(draw(other, negative_prompt="a clock"), expected, **CLOSE)


def test_only_the_prompt_is_encoded_where_the_empty_prompt_is_zeros(xl_loaded, draw) -> None:
    draw(xl_loaded)
    rows = xl_loaded.gate_weights().where(network="text_encoder_2")
    assert {row.branch for row in rows} == {"prompt"}


def test_base_and_eject_are_bitwise(xl_loaded, xl_plain, draw) -> None:
    train_a_little(xl_loaded)
    expected = draw(xl_plain)
    torch.testing.assert_close(draw(xl_loaded, mixture="none"), expected, rtol=0, atol=0)
    xl_loaded.eject()
    torch.testing.assert_close(draw(xl_loaded), expected, rtol=0, atol=0)


def test_a_second_lora_stacks(xl_loaded, xl_plain, draw, xl_lora_files) -> None:
    """Inside the mixture one, through `load_lora_weights` the other: together the sum of both."""
    expected = draw(with_adapters(xl_plain, xl_lora_files, {"boot": 1.0, "cat": 1.0}))
    before = draw(xl_loaded, active_experts=["boot"])
    xl_loaded.load_lora_weights(xl_lora_files["cat"], adapter_name="second")
    torch.testing.assert_close(draw(xl_loaded, active_experts=["boot"]), expected, **CLOSE)
    xl_loaded.unload_lora_weights()
    torch.testing.assert_close(draw(xl_loaded, active_experts=["boot"]), before, **CLOSE)


def test_save_pretrained_is_a_plain_sdxl(xl_loaded, xl_plain, draw, tmp_path, xl_lora_files) -> None:
    expected = draw(xl_loaded)
    xl_loaded.save_pretrained(tmp_path)
    for cls in (StableDiffusionXLMoLEPipeline, StableDiffusionXLPipeline, DiffusionPipeline):
        again = cls.from_pretrained(tmp_path, add_watermarker=False)
        again.set_progress_bar_config(disable=True)
        torch.testing.assert_close(draw(again), draw(xl_plain), rtol=0, atol=0)
        if cls is StableDiffusionXLMoLEPipeline:
            for name, path in xl_lora_files.items():
                again.load_expert(path, name=name)
            torch.testing.assert_close(draw(again), expected, rtol=0, atol=1e-6)


def test_region_masks_and_picture_size(xl_loaded, draw) -> None:
    train_a_little(xl_loaded)
    left = torch.zeros(32, 48)
    left[:, :24] = 1
    masks = {"boot": left, "cat": 1 - left}
    masked = draw(xl_loaded, height=32, width=48, region_masks=masks)
    assert masked.shape == (1, 3, 32, 48)
    assert (masked - draw(xl_loaded, height=32, width=48)).abs().max() > 0.01


@pytest.mark.parametrize("first", ["experts", "hidden states"])
def test_block_outputs_of_text_encoders(xl_components, xl_lora_files, xl_plain, draw, first) -> None:
    """transformers 5 collects hidden states by hooks on the very blocks that run once per expert."""
    pipe = build(StableDiffusionXLMoLEPipeline, xl_components)
    if first == "hidden states":
        draw(pipe)
    pipe.configure(MoLEConfig(composition="output"))
    for name, path in xl_lora_files.items():
        pipe.load_expert(path, name=name)
    train_a_little(pipe)
    expected = draw(with_adapters(xl_plain, xl_lora_files, {"cat": 1.0}))
    torch.testing.assert_close(draw(pipe, active_experts=["cat"]), expected, **CLOSE)
