"""Through the whole pipeline: our mixtures against diffusers' and PEFT's adapters on the same files."""

import pytest
import torch
from pipeline_helpers import CLOSE, train_a_little, with_adapters

from mole_diffusion import MoLEConfig

NAMES = ["boot", "cat", "clock"]


def test_no_experts_is_the_plain_pipeline(pipe, plain, draw) -> None:
    torch.testing.assert_close(draw(pipe), draw(plain), rtol=0, atol=0)


def test_experts_change_the_picture(pipe, loaded, plain, draw) -> None:
    assert (draw(loaded) - draw(plain)).abs().max() > 0.05


@pytest.mark.parametrize("name", NAMES)
def test_one_active_expert_is_that_lora(loaded, plain, draw, lora_files, name) -> None:
    train_a_little(loaded)
    expected = draw(with_adapters(plain, lora_files, {name: 1.0}))
    torch.testing.assert_close(draw(loaded, active_experts=[name]), expected, **CLOSE)


def test_load_scale_is_the_adapter_weight(pipe, plain, draw, lora_files) -> None:
    pipe.load_expert(lora_files["cat"], name="cat", scale=0.7)
    expected = draw(with_adapters(plain, lora_files, {"cat": 0.7}))
    torch.testing.assert_close(draw(pipe), expected, **CLOSE)


def test_call_scale_multiplies(loaded, plain, draw, lora_files) -> None:
    expected = draw(with_adapters(plain, lora_files, {"cat": 0.5}))
    torch.testing.assert_close(
        draw(loaded, active_experts=["cat"], expert_scales={"cat": 0.5}), expected, **CLOSE
    )


@pytest.mark.parametrize(
    ("mixture", "weights"),
    [
        ("la", dict.fromkeys(NAMES, 1.0)),
        ("nla", dict.fromkeys(NAMES, 1 / 3)),
        ({"clock": 0.4, "boot": -0.6}, {"clock": 0.4, "boot": -0.6}),
    ],
    ids=["la", "nla", "weights"],
)
def test_fixed_mixture_is_set_adapters(loaded, plain, draw, lora_files, mixture, weights) -> None:
    train_a_little(loaded)
    expected = draw(with_adapters(plain, lora_files, weights))
    torch.testing.assert_close(draw(loaded, mixture=mixture), expected, **CLOSE)


def test_nla_of_two_active_is_a_half_each(loaded, plain, draw, lora_files) -> None:
    expected = draw(with_adapters(plain, lora_files, {"cat": 0.5, "clock": 0.5}))
    torch.testing.assert_close(
        draw(loaded, mixture="nla", active_experts=["cat", "clock"]), expected, **CLOSE
    )


def test_fresh_gates_of_strength_one_are_nla(loaded, plain, draw, lora_files) -> None:
    loaded.configure(MoLEConfig(strength=1.0))
    expected = draw(with_adapters(plain, lora_files, dict.fromkeys(NAMES, 1 / 3)))
    torch.testing.assert_close(draw(loaded, mixture="gates"), expected, **CLOSE)


def test_fresh_gates_share_their_strength(loaded, plain, draw, lora_files) -> None:
    loaded.configure(MoLEConfig(strength=1.5, text_strength=1.5))
    expected = draw(with_adapters(plain, lora_files, dict.fromkeys(NAMES, 0.5)))
    torch.testing.assert_close(draw(loaded, mixture="gates"), expected, **CLOSE)


def test_mixture_none_is_the_base_bitwise(loaded, plain, draw) -> None:
    train_a_little(loaded)
    torch.testing.assert_close(draw(loaded, mixture="none"), draw(plain), rtol=0, atol=0)


def test_trained_gates_change_the_picture_and_come_back_after_other_mixtures(loaded, draw) -> None:
    fresh = draw(loaded, mixture="gates")
    train_a_little(loaded)
    trained = draw(loaded)
    assert (trained - fresh).abs().max() > 0.01
    for mixture in ("none", "la", {"cat": 1.0}):
        draw(loaded, mixture=mixture)
    torch.testing.assert_close(draw(loaded), trained, rtol=0, atol=0)


def test_eject_restores_the_base_bitwise(loaded, plain, draw) -> None:
    draw(loaded)
    loaded.eject()
    assert not loaded.experts
    assert not loaded.mixtures
    hooks = [
        m for network in (loaded.unet, loaded.text_encoder) for m in network.modules() if m._forward_hooks
    ]
    assert hooks == []
    torch.testing.assert_close(draw(loaded), draw(plain), rtol=0, atol=0)
    plain_keys = list(plain.unet.state_dict())
    assert list(loaded.unet.state_dict()) == plain_keys
