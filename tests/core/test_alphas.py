"""Alphas that stand in a header alone: which counts, what is said of it, and what a damaged entry does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mole_diffusion import Expert, ExpertLoadError, load_expert

QUERY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "mid_block.resnets.0.conv1"
TEXT = "text_model.encoder.layers.0.mlp.fc1"
RANK = 2


def pair(module: str, kernel: tuple[int, ...] = ()) -> dict[str, Tensor]:
    ones = (1,) * len(kernel)
    return {
        f"{module}.lora_A.weight": torch.ones(RANK, 32, *kernel),
        f"{module}.lora_B.weight": torch.ones(32, RANK, *ones),
    }


STATE = pair(f"unet.{QUERY}") | pair(f"unet.{CONV}", (3, 3)) | pair(f"text_encoder.{TEXT}")
LOKR = {f"unet.{QUERY}.lokr_w1": torch.ones(4, 4), f"unet.{QUERY}.lokr_w2": torch.ones(8, 8)}


def scalings(metadata: dict[str, str], state: dict[str, Tensor] = STATE) -> dict[str, float]:
    expert = Expert.from_state_dict(state, name="dog", metadata=metadata)
    return {
        name: factors.scaling for matrices in expert.factors.values() for name, factors in matrices.items()
    }


def adapter(**settings: Any) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({name.replace("__", "."): v for name, v in settings.items()})}


@pytest.mark.parametrize(
    ("metadata", "query", "conv", "text", "source"),
    [
        ({}, 1.0, 1.0, 1.0, "nowhere (alpha is r)"),
        (adapter(unet__lora_alpha=8), 4.0, 4.0, 1.0, "header's lora_adapter_metadata"),
        (adapter(lora_alpha=8), 4.0, 4.0, 4.0, "header's lora_adapter_metadata"),
        (adapter(lora_alpha=8, text_encoder__lora_alpha=2), 4.0, 4.0, 1.0, "header's lora_adapter_metadata"),
        (adapter(unet__lora_alpha="8"), 4.0, 4.0, 1.0, "header's lora_adapter_metadata"),
        (adapter(unet__lora_alpha=None), 1.0, 1.0, 1.0, "nowhere (alpha is r)"),
        (
            adapter(lora_alpha=8, use_rslora=True),
            *(8 / math.sqrt(2),) * 3,
            "header's lora_adapter_metadata",
        ),
        (
            adapter(unet__lora_alpha=8, unet__alpha_pattern={"attn1.to_q": 6, "to_q": 2}),
            *(3.0, 4.0, 1.0),
            "header's lora_adapter_metadata",
        ),
        (
            adapter(text_encoder__alpha_pattern={TEXT: 6}),
            *(1.0, 1.0, 3.0),
            "header's lora_adapter_metadata",
        ),
        (
            adapter(text_encoder__alpha_pattern={TEXT.removeprefix("text_model."): 6}),
            *(1.0, 1.0, 3.0),
            "header's lora_adapter_metadata",
        ),
        ({"lora_alpha": "8", "r": "2"}, 4.0, 4.0, 4.0, "header's lora_alpha"),
        ({"unet.lora_alpha": "8", "unet.r": "2"}, 4.0, 4.0, 1.0, "header's unet.lora_alpha"),
        ({"unet.lora_alpha": "8", "lora_alpha": "6"}, 4.0, 4.0, 3.0, "header's unet.lora_alpha"),
        ({"lora_alpha": "8", "use_rslora": "True"}, *(8 / math.sqrt(2),) * 3, "header's lora_alpha"),
        ({"network_alpha": "8"}, 4.0, 4.0, 4.0, "header's network_alpha"),
        ({"alpha": "8"}, 4.0, 4.0, 4.0, "header's alpha"),
        ({"ss_network_alpha": "8.0", "ss_network_dim": "2"}, 4.0, 4.0, 4.0, "header's ss_network_alpha"),
        ({"ss_network_alpha": "None"}, 1.0, 1.0, 1.0, "nowhere (alpha is r)"),
        (
            {"ss_network_alpha": "8", "ss_network_args": '{"conv_dim": "2", "conv_alpha": "1"}'},
            *(4.0, 0.5, 4.0),
            "header's ss_network_alpha",
        ),
        ({"ss_network_alpha": "8", "ss_network_args": "None"}, 4.0, 4.0, 4.0, "header's ss_network_alpha"),
        # What is nearer to the tensors counts.
        (
            {**adapter(lora_alpha=8), "lora_alpha": "6", "ss_network_alpha": "2"},
            *(4.0, 4.0, 4.0),
            "header's lora_adapter_metadata",
        ),
        ({"lora_alpha": "6", "ss_network_alpha": "2"}, 3.0, 3.0, 3.0, "header's lora_alpha"),
    ],
)
def test_sources(metadata: dict[str, str], query: float, conv: float, text: float, source: str) -> None:
    assert scalings(metadata) == {
        QUERY: pytest.approx(query),
        CONV: pytest.approx(conv),
        TEXT.removeprefix("text_model."): pytest.approx(text),
    }
    report = Expert.from_state_dict(STATE, name="dog", metadata=metadata).report
    assert source in report.alphas
    assert sum(report.alphas.values()) == 3
    assert (source in report.summary()) == ("header" in source)


def test_tensors_win() -> None:
    headers = {**adapter(lora_alpha=8), "lora_alpha": "6", "network_alpha": "x", "ss_network_alpha": "nan"}
    alphas = {f"{key.split('.lora_')[0]}.alpha": torch.tensor(3) for key in STATE if "lora_A" in key}
    expert = Expert.from_state_dict(STATE | alphas, name="dog", metadata=headers)
    assert {f.scaling for own in expert.factors.values() for f in own.values()} == {1.5}
    assert expert.report.alphas == {"tensors": 3}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            adapter(unet__lora_alpha="x"),
            "header's lora_adapter_metadata: lora_alpha='x' is not a finite number",
        ),
        (adapter(unet__lora_alpha=[8]), r"lora_alpha=\[8\] is not a finite number"),
        (adapter(unet__lora_alpha=float("nan")), "lora_alpha=nan is not a finite number"),
        (adapter(unet__lora_alpha=float("inf")), "lora_alpha=inf is not a finite number"),
        (adapter(unet__alpha_pattern=[1]), r"alpha_pattern=\[1\] is no table of names"),
        (adapter(unet__alpha_pattern={"to_q": {}}), r"alpha_pattern of 'to_q'={} is not a finite number"),
        (adapter(unet__init_lora_weights="pissa"), "init_lora_weights='pissa' is not read"),
        (adapter(unet__bias="lora_only"), "bias='lora_only' is not read"),
        ({"lora_adapter_metadata": "x"}, "header's lora_adapter_metadata cannot be read: it is no JSON"),
        (
            {"lora_adapter_metadata": "[1]"},
            "header's lora_adapter_metadata cannot be read: it is no JSON object",
        ),
        (
            {"lora_adapter_metadata": "[" * 9999},
            "header's lora_adapter_metadata cannot be read: its brackets",
        ),
        ({"lora_adapter_metadata": "9" * 5000}, "cannot be read: it has a number of too many digits"),
        ({"lora_alpha": "x"}, "header: lora_alpha='x' is not a finite number"),
        ({"unet.lora_alpha": "1e999"}, "header: unet.lora_alpha='1e999' is not a finite number"),
        ({"network_alpha": "[]"}, r"header: network_alpha='\[\]' is not a finite number"),
        ({"ss_network_alpha": "nan"}, "header: ss_network_alpha='nan' is not a finite number"),
        ({"lora_alpha": "8", "use_rslora": "x"}, "use_rslora='x' is not allowed"),
        ({"lora_alpha": "x\n" * 1000}, "header: lora_alpha='x"),
    ],
)
def test_damaged_entries(metadata: dict[str, str], message: str, tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "dog.safetensors", metadata=metadata)
    with pytest.raises(ExpertLoadError, match=message) as caught:
        load_expert(tmp_path / "dog.safetensors")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_damaged_entry_that_does_not_count_is_no_error() -> None:
    alphas = {f"{key.split('.lora_')[0]}.alpha": torch.tensor(3.0) for key in STATE if "lora_A" in key}
    for metadata in ({"lora_adapter_metadata": "{"}, {"lora_alpha": "x"}, {"ss_network_alpha": "x"}):
        assert set(scalings(metadata, STATE | alphas).values()) == {1.5}
    assert scalings({**adapter(lora_alpha=8), "lora_alpha": "x"})[QUERY] == 4.0


def test_whole_lokr_factors_have_no_scaling_of_lycoris() -> None:
    """LyCORIS does not scale them, PEFT does."""
    for metadata, expected in (
        ({"ss_network_alpha": "8", "ss_network_dim": "2"}, 1.0),
        (adapter(peft_type="LOKR", r=4, alpha=8), 2.0),
        (adapter(peft_type="LOKR", alpha=8), 1.0),
    ):
        expert = Expert.from_state_dict(LOKR, name="dog", metadata=metadata)
        delta = expert.factors["unet"][QUERY].delta()
        torch.testing.assert_close(delta, torch.full((32, 32), expected))


def test_what_a_header_says_for_others_is_told() -> None:
    expert = Expert.from_state_dict(STATE, name="dog", metadata={"transformer.lora_alpha": "64"})
    assert expert.report.notes == (
        "the header's transformer.lora_alpha='64' is not used: it belongs to none of these matrices",
    )
    assert expert.report.notes[0] in expert.report.summary()
    other = Expert.from_state_dict(STATE, name="dog", metadata={"lora_alpha": "8", "r": "4"})
    assert other.report.notes == (
        "header's lora_alpha names r=4, and the factors of 3 matrices have another "
        f"('unet.{QUERY}' has 2), which counts",
    )


def test_stacked_loras_under_one_alpha_are_told() -> None:
    """kohya's split_qkv=True (here for OpenCLIP's fused in_proj): a third, as every program reads it."""
    width, rank = 24, 2
    up = torch.block_diag(*(torch.ones(width, rank) for _ in range(3)))
    module = "lora_te2_transformer_resblocks_0_attn_in_proj"
    state = {
        f"{module}.lora_down.weight": torch.ones(3 * rank, width),
        f"{module}.lora_up.weight": up,
        f"{module}.alpha": torch.tensor(float(rank)),
    }
    expert = Expert.from_state_dict(state, name="dog")
    factors = expert.factors["text_encoder_2"]
    assert [one.scaling for one in factors.values()] == [pytest.approx(1 / 3)] * 3
    (note,) = expert.report.notes
    assert "1 fused matrices are stacked of several LoRAs (split_qkv=True" in note
    assert "0.33 of what each had" in note


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (torch.tensor(float("nan")), "is nan; an alpha is a finite number"),
        (torch.tensor(float("inf"), dtype=torch.bfloat16), "is inf; an alpha is a finite number"),
        (torch.tensor(1e300, dtype=torch.float64), "is inf; an alpha is a finite number"),
        (torch.ones(2), r"is float32 of shape \(2,\); an alpha is one number"),
        (torch.ones(0), r"is float32 of shape \(0,\); an alpha is one number"),
        (torch.tensor(True), r"is bool of shape \(\); an alpha is one number"),
        (torch.tensor(1j), r"is complex64 of shape \(\); an alpha is one number"),
    ],
)
def test_alphas_that_are_no_numbers(alpha: Tensor, message: str) -> None:
    with pytest.raises(ExpertLoadError, match=rf"'unet.{QUERY}.alpha' {message}"):
        scalings({}, STATE | {f"unet.{QUERY}.alpha": alpha})


@pytest.mark.parametrize(
    "alpha",
    [
        *(torch.tensor(3, dtype=dtype) for dtype in (torch.int64, torch.uint8, torch.float8_e5m2)),
        *(torch.tensor([3.0]), torch.tensor(3.0, dtype=torch.float64)),
    ],
)
def test_alphas_of_other_types(alpha: Tensor) -> None:
    assert scalings({}, STATE | {f"unet.{QUERY}.alpha": alpha})[QUERY] == 1.5


@pytest.mark.parametrize(
    "frequency",
    [
        '{"10_dog": {"b": null}}',
        '{"10_dog": {"b": "many"}}',
        '{"10_dog": {"b": {"c": 1}}}',
        '{"10_dog": {"b": Infinity}}',
        '{"10_dog": {"b": NaN}}',
        '{"10_dog": [1]}',
        "[]",
        "3",
        "{",
        '{"10_dog": {"\\ud800": 3}}',
        "[" * 100_000 + "]" * 100_000,
        "9" * 10_000,
    ],
)
def test_tag_counts_that_are_none(frequency: str) -> None:
    assert Expert.from_state_dict(STATE, name="dog", metadata={"ss_tag_frequency": frequency}).triggers == ()


def test_the_good_tags_of_a_damaged_count_are_used() -> None:
    frequency = '{"10_dog": {"a": null, "zorin boot": 3, "grass": 2.0}, "x": 1, "20": {"grass": 2}}'
    expert = Expert.from_state_dict(STATE, name="dog", metadata={"ss_tag_frequency": frequency})
    assert expert.triggers == ("grass",)
