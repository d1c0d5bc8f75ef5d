"""A matrix of a file is complete or refused: no key of it is passed over while the others act."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mole_diffusion import Expert, ExpertLoadError
from mole_diffusion.core.key_table import KeyTable

BLOCK = "mid_block.attentions.0.transformer_blocks.0.attn1"
QUERY, KEY = f"unet.{BLOCK}.to_q", f"unet.{BLOCK}.to_k"
FLAT = f"lora_unet_{BLOCK.replace('.', '_')}_to_q"
HALF = "the other factor is missing"


def pair(module: str) -> dict[str, Tensor]:
    return {f"{module}.lora_A.weight": torch.ones(2, 32), f"{module}.lora_B.weight": torch.ones(32, 2)}


def loha(module: str) -> dict[str, Tensor]:
    return {
        f"{module}.hada_{w}_{f}": torch.ones(32, 2) if f == "a" else torch.ones(2, 32)
        for w in ("w1", "w2")
        for f in "ab"
    }


@pytest.mark.parametrize(
    ("added", "reason"),
    [
        (f"{QUERY}.lora_C.weight", "not a LoRA key of a known dialect"),
        (f"{QUERY}.lora_A.scale_weight", "not a LoRA key of a known dialect"),
        (f"{QUERY}.lora_E", "not a LoRA key of a known dialect"),
        (f"{QUERY}.lora_diag.default", "not a LoRA key of a known dialect"),
        (f"{QUERY}.bias", "not a LoRA key of a known dialect"),
        (f"{QUERY}.set_weight", "whole weights are no differences"),
        (f"{QUERY}.oft_blocks", "OFT changes the base's weights"),
        # The same matrix by other names.
        (f"base_model.model.{BLOCK}.to_q.lora_E", "not a LoRA key of a known dialect"),
        (f"{FLAT}.lora_E", "not a LoRA key of a known dialect"),
        (f"{FLAT}.set_weight", "whole weights are no differences"),
        (f"{FLAT}.dora_scale", HALF),
        (f"{FLAT}.lora_down.weight", HALF),
        # What the kind of the others would not use.
        (f"{QUERY}.hada_t1", HALF),
        (f"{QUERY}.lokr_w1", HALF),
    ],
)
def test_one_key_that_cannot_be_used_refuses_the_whole_matrix(added: str, reason: str) -> None:
    state = pair(QUERY) | pair(KEY)
    expert = Expert.from_state_dict(state | {added: torch.ones(32)}, name="dog")
    assert set(expert.factors["unet"]) == {f"{BLOCK}.to_k"}
    assert set(expert.report.loaded) == set(pair(KEY))
    assert set(expert.report.ignored) == {*pair(QUERY), added}
    for key in pair(QUERY):
        assert reason in expert.report.ignored[key]
    assert reason in expert.report.summary()
    with pytest.raises(ExpertLoadError, match="none of its 3 keys can be used"):
        Expert.from_state_dict(pair(QUERY) | {added: torch.ones(32)}, name="dog")


@pytest.mark.parametrize(
    ("state", "surplus"),
    [
        (loha(QUERY) | pair(QUERY), "lora_A"),
        (loha(QUERY) | {f"{QUERY}.hada_t1": torch.ones(2, 2, 3, 3)}, "hada_t1"),
        (pair(QUERY) | {f"{QUERY}.diff": torch.ones(32, 32)}, "lora_A"),
        (
            {f"{QUERY}.lokr_w1": torch.ones(4, 4), f"{QUERY}.lokr_w2": torch.ones(8, 8)}
            | {f"{QUERY}.lokr_w2_a": torch.ones(8, 2), f"{QUERY}.lokr_w2_b": torch.ones(2, 8)},
            "lokr_w2_a",
        ),
        (
            pair(QUERY) | {f"{QUERY}.diff_b": torch.ones(32), f"{QUERY}.lora_B.bias": torch.ones(32)},
            "lora_B.bias",
        ),
        (
            pair(QUERY)
            | {f"{QUERY}.dora_scale": torch.ones(32, 1), f"{QUERY}.lora_magnitude_vector": torch.ones(32)},
            "dora_scale",
        ),
    ],
)
def test_tensors_of_two_kinds_refuse_the_whole_matrix(state: dict[str, Tensor], surplus: str) -> None:
    assert any(surplus in key for key in state)
    expert = Expert.from_state_dict(state | pair(KEY), name="dog")
    assert set(expert.report.loaded) == set(pair(KEY))
    assert set(expert.report.ignored) == set(state)
    assert all("tensors of two kinds for one matrix" in text for text in expert.report.ignored.values())


def test_keys_of_other_matrices_refuse_nothing() -> None:
    """Not of one whose name begins alike, nor of a layer around it."""
    state = pair(QUERY) | pair(KEY)
    more = {f"unet.{BLOCK}.weight", f"unet.{BLOCK}.to_q_extra.lora_C.weight", "step", "unet.conv_in.weight"}
    expert = Expert.from_state_dict(state | dict.fromkeys(more, torch.ones(2)), name="dog")
    assert set(expert.report.loaded) == set(state)
    assert set(expert.report.ignored) == more


def test_two_keys_for_one_thing() -> None:
    with pytest.raises(
        ExpertLoadError, match=r"cat.weight' and '.*lora_A.weight' are both the down of one matrix"
    ):
        Expert.from_state_dict(pair(QUERY) | {f"{QUERY}.lora_A.cat.weight": torch.ones(2, 32)}, name="dog")
    bundle = {f"bundle_emb.zorin.{end}": torch.ones(2, 16) for end in ("clip_l", "emb_params")}
    with pytest.raises(ExpertLoadError, match=r"'bundle_emb.zorin.clip_l' are both the embedding of 'zorin'"):
        Expert.from_state_dict(pair(QUERY) | bundle, name="dog")
    with pytest.raises(
        ExpertLoadError, match=r"is the second entry for matrix 'mid_block.*to_q' of the unet"
    ):
        Expert.from_state_dict(pair(QUERY) | pair(FLAT), name="dog")


def test_no_tensor_is_needed() -> None:
    table = KeyTable.of(
        [*pair(QUERY), f"{KEY}.lora_A.weight", "bundle_emb.zorin.clip_g", "bundle_emb.zorin.x", "step"]
    )
    assert table.modules == {QUERY: {"down": f"{QUERY}.lora_A.weight", "up": f"{QUERY}.lora_B.weight"}}
    assert table.embeddings == {"bundle_emb.zorin.clip_g": ("zorin", "text_encoder_2")}
    assert table.missing == [f"{KEY} (up factor)"]
    assert set(table.ignored) == {f"{KEY}.lora_A.weight", "bundle_emb.zorin.x", "step"}


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize(
    "key", [f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight", "bundle_emb.zorin.clip_l"]
)
def test_other_types_are_never_read_as_numbers(key: str, dtype: torch.dtype) -> None:
    state = pair(QUERY) | {"bundle_emb.zorin.clip_l": torch.ones(2, 16)}
    state[key] = state[key].to(dtype)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ExpertLoadError, match=rf"'{key}' is of type {name}; allowed are float64, float32,"):
        Expert.from_state_dict(state, name="dog")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bits_are_read_with_their_values(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {
        key: torch.randn(value.shape, generator=generator).to(dtype) for key, value in pair(QUERY).items()
    }
    state["bundle_emb.zorin.clip_l"] = torch.randn(2, 16, generator=generator).to(dtype)
    expert = Expert.from_state_dict(state, name="dog")
    factors = expert.factors["unet"][f"{BLOCK}.to_q"]
    assert torch.equal(factors.down.float(), state[f"{QUERY}.lora_A.weight"].float())
    assert torch.equal(factors.up.float(), state[f"{QUERY}.lora_B.weight"].float())
    vectors = expert.embeddings["zorin"]["text_encoder"]
    assert torch.equal(vectors.float(), state["bundle_emb.zorin.clip_l"].float())
    Expert.from_state_dict(state, name="dog", rank=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize(
    "key", [f"{QUERY}.lora_A.weight", f"{QUERY}.dora_scale", f"{QUERY}.diff_b", "bundle_emb.zorin.clip_l"]
)
def test_values_that_are_not_finite(key: str, dtype: torch.dtype, value: float) -> None:
    state = pair(QUERY) | {
        f"{QUERY}.dora_scale": torch.ones(32, 1),
        f"{QUERY}.diff_b": torch.ones(32),
        "bundle_emb.zorin.clip_l": torch.ones(2, 16),
    }
    broken = state[key].clone()
    broken.view(-1)[7] = value
    with pytest.raises(ExpertLoadError, match=rf"'{key}' holds values that are not finite \({value}\)"):
        Expert.from_state_dict(state | {key: broken.to(dtype)}, name="dog")


def test_values_that_nothing_uses_may_be_anything() -> None:
    nan = torch.full((2, 2), float("nan"))
    expert = Expert.from_state_dict(pair(QUERY) | {"step": nan, "optimizer": nan.to(torch.int8)}, name="dog")
    assert set(expert.report.ignored) == {"step", "optimizer"}


def test_products_that_are_too_large() -> None:
    state = {key: value * 1e20 for key, value in loha(QUERY).items()}
    with pytest.raises(ExpertLoadError, match="products of its tensors are too large for float32"):
        Expert.from_state_dict(state, name="dog")
    with pytest.raises(ExpertLoadError, match=r"'.*lora_A.weight' is empty: its shape is \(0, 32\)"):
        Expert.from_state_dict(pair(QUERY) | {f"{QUERY}.lora_A.weight": torch.ones(0, 32)}, name="dog")
