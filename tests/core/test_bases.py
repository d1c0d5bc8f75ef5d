"""An expert for another base is refused in words; `mole inspect` says what a file is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mole_diffusion import Expert, ExpertLoadError, InjectionError, MoLEConfig, inject
from mole_diffusion.core.bases import base_of_expert, check_prediction, prediction_type
from mole_diffusion.core.inspection import describe_file
from mole_diffusion.core.networks.families import SD1, SD2, SDXL

from .core_tools import make_unet, run
from .dialect_tools import make_unet as make_family

QUERY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def full_size(family: str, leaves: tuple[str, ...] = ("attn1.to_q", "attn2.to_k")) -> dict[str, Tensor]:
    """A LoRA of rank 1 with the names and shapes of the real network."""
    with torch.device("meta"):
        unet = make_family(family, full=True)
    state = {}
    for name, module in unet.named_modules():
        if name.endswith(leaves):
            state[f"unet.{name}.lora_A.weight"] = torch.zeros(1, module.weight.shape[1])
            state[f"unet.{name}.lora_B.weight"] = torch.zeros(module.weight.shape[0], 1)
    return state


@pytest.mark.parametrize(
    ("file", "network"), [("sdxl", "sd15"), ("sd15", "sdxl"), ("sd21", "sd15"), ("sd15", "sd21")]
)
def test_another_base_is_named_with_the_matrices_that_differ(file: str, network: str) -> None:
    names = {"sd15": SD1, "sd21": SD2, "sdxl": SDXL}
    expert = Expert.from_state_dict(full_size(file), name="dog")
    assert base_of_expert(expert).family == names[file]
    with torch.device("meta"):
        unet = make_family(network, full=True)
    with pytest.raises(InjectionError) as caught:
        inject(unet, [expert], MoLEConfig())
    text = str(caught.value)
    assert f"made for {names[file]} (cross-attention to text of width" in text
    assert f"this UNet2DConditionModel is of {names[network]} (" in text
    assert "attn2.to_k': its delta is" in text
    assert text.count("its delta is") == 3
    assert " more. It was made" in text
    assert not unet._forward_pre_hooks
    assert not any(module._forward_hooks for module in unet.modules())


def test_a_header_that_names_another_base_counts_where_shapes_do_not() -> None:
    """SD 2.x has the self-attention of SD 1.x."""
    with torch.device("meta"):
        unet = make_family("sd21", full=True)
    state = full_size("sd15", ("attn1.to_q",))
    for header in (
        {"ss_base_model_version": "sd_v1"},
        {"modelspec.architecture": "stable-diffusion-v1/lora"},
    ):
        expert = Expert.from_state_dict(state, name="dog", metadata=header)
        with pytest.raises(
            InjectionError, match=rf"made for {SD1}; this UNet2DConditionModel is of {SD2} \("
        ):
            inject(unet, [expert], MoLEConfig())
    inject(unet, [Expert.from_state_dict(state, name="dog")], MoLEConfig()).eject()
    fits = Expert.from_state_dict(state, name="dog", metadata={"ss_base_model_version": "sd_v2"})
    inject(unet, [fits], MoLEConfig()).eject()


def test_nothing_is_half_loaded(unet: nn.Module) -> None:
    before = run(unet)
    state = {
        f"{QUERY}.lora_A.weight": torch.ones(1, 32),
        f"{QUERY}.lora_B.weight": torch.ones(32, 1),
        "conv_out.lora_A.weight": torch.ones(1, 16, 1, 1),
        "conv_out.lora_B.weight": torch.ones(4, 1, 1, 1),
    }
    expert = Expert.from_state_dict(state, name="dog")
    with pytest.raises(InjectionError, match=r"'conv_out': its delta is 4 x 16, the matrix 4 x 144"):
        inject(unet, [expert], MoLEConfig())
    torch.testing.assert_close(run(unet), before, rtol=0, atol=0)
    assert list(unet.state_dict()) == list(make_unet().state_dict())


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({}, None),
        ({"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ({"modelspec.prediction_type": "v"}, "v_prediction"),
        ({"modelspec.prediction_type": "flow"}, None),
        ({"ss_v_parameterization": "True"}, "v_prediction"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "v_prediction"),
    ],
)
def test_prediction_type(header: dict[str, str], expected: str | None) -> None:
    assert prediction_type(header) == expected
    state = {f"{QUERY}.lora_A.weight": torch.ones(1, 32), f"{QUERY}.lora_B.weight": torch.ones(32, 1)}
    expert = Expert.from_state_dict(state, name="dog", metadata=header)
    for prediction in ("epsilon", "v_prediction"):
        if expected in (None, prediction):
            check_prediction(expert, prediction)
        else:
            with pytest.raises(
                ExpertLoadError, match=f"predicts '{expected}' .* this base predicts '{prediction}'"
            ):
                check_prediction(expert, prediction)


def test_inspection(tmp_path: Path) -> None:
    block = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k"
    conv = "lora_unet_input_blocks_4_0_in_layers_2"
    state = {
        f"{block}.lora_down.weight": torch.ones(2, 2048),
        f"{block}.lora_up.weight": torch.ones(640, 2),
        f"{block}.alpha": torch.tensor(1.0),
        f"{conv}.hada_w1_a": torch.ones(8, 2),
        f"{conv}.hada_w1_b": torch.ones(2, 72),
        f"{conv}.hada_w2_a": torch.ones(8, 2),
        f"{conv}.hada_w2_b": torch.ones(2, 72),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.oft_blocks": torch.ones(2, 2, 2),
        "bundle_emb.zor.clip_l": torch.ones(3, 768),
    }
    header = {"ss_base_model_version": "sdxl_base_v1-0", "ss_tag_frequency": "x" * 500}
    header["modelspec.prediction_type"] = "epsilon"
    save_file(state, tmp_path / "dog.safetensors", metadata=header)
    found = describe_file(tmp_path / "dog.safetensors")
    assert found.facts["dialect"] == "kohya, LDM blocks"
    assert found.facts["base"] == f"{SDXL} (cross-attention to text of width 2048)"
    assert found.facts["prediction"] == "epsilon"
    assert found.facts["triggers"] == "zor"
    assert found.sections["networks"] == ["unet: 2 matrices, 1 of rank 2, 1 of rank 4; 1 as LoHa, 1 as LoRA"]
    assert found.sections["matrices of the unet"] == ["1 x attn2.to_k", "1 x conv1"]
    assert found.sections["embeddings"] == ["zor: 3 x 768 (text_encoder)"]
    assert f"ss_tag_frequency: {'x' * 120}... (500 characters)" in found.sections["header"]
    (ignored,) = found.sections["ignored keys"]
    assert "OFT changes the base's weights by a factor" in ignored
    matrices = found.to_dict()["networks"]["unet"]
    assert matrices["down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"] == {"rank": 2, "alpha": 1.0}
    assert matrices["down_blocks.1.resnets.0.conv1"]["kind"] == "LoHa"
