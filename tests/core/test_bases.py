"""An expert for another base is refused in words; `mole inspect` says what a file is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from tiny.families import make_unet as make_family
from tiny.networks import make_clip, make_unet, run
from torch import Tensor, nn

from mole_diffusion import Expert, ExpertLoadError, InjectionError, MoLEConfig, inject, load_expert
from mole_diffusion.core.bases import (
    base_of_expert,
    base_of_networks,
    check_prediction,
    prediction_type,
    told_base,
)
from mole_diffusion.core.inspection import describe_file
from mole_diffusion.core.networks.base import Base
from mole_diffusion.core.networks.families import FLUX1, SD1, SD2, SDXL
from mole_diffusion.core.writers import writer_of

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


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"ss_sd_model_name": "Illustrious-XL-v1.0.safetensors"}, "; Illustrious, says its header"),
        ({"ss_sd_model_name": "ponyDiffusionV6XL.safetensors"}, "; Pony, says its header"),
        ({"modelspec.base_model": "NoobAI-XL-Vpred"}, "; NoobAI, says its header"),
        ({"ss_sd_model_name": "sd_xl_base_1.0.safetensors", "modelspec.title": "pony"}, ""),
        ({"ss_sd_model_name": "ponytails-xl"}, ""),
        ({}, ""),
    ],
)
def test_descendants_of_sdxl_are_told_where_the_header_names_them(
    metadata: dict[str, str], said: str
) -> None:
    """Their matrices are SDXL's."""

    def expert(width: int) -> Expert:
        name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
        tensors = {
            f"{name}.lora_down.weight": torch.ones(4, width),
            f"{name}.lora_up.weight": torch.ones(640, 4),
        }
        return Expert.from_state_dict(tensors, name="style", metadata=metadata)

    assert told_base(expert(2048)) == f"{base_of_expert(expert(2048))}{said}"
    # A word in the header of something else is not believed.
    assert told_base(expert(768)) == str(base_of_expert(expert(768)))


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
        "bundle_emb.zorin.clip_l": torch.ones(3, 768),
    }
    header = {"ss_base_model_version": "sdxl_base_v1-0", "ss_tag_frequency": "x" * 500}
    header["modelspec.prediction_type"] = "epsilon"
    save_file(state, tmp_path / "dog.safetensors", metadata=header)
    found = describe_file(tmp_path / "dog.safetensors")
    assert found.facts["dialect"] == "kohya, LDM blocks"
    assert found.facts["base"] == f"{SDXL} (cross-attention to text of width 2048)"
    assert found.facts["prediction"] == "epsilon"
    assert found.facts["triggers"] == "zorin"
    assert found.sections["networks"] == ["unet: 2 matrices, 1 of rank 2, 1 of rank 4; 1 as LoHa, 1 as LoRA"]
    assert found.sections["matrices of the unet"] == ["1 x attn2.to_k", "1 x conv1"]
    assert found.sections["embeddings"] == ["zorin: 3 x 768 (text_encoder)"]
    assert f"ss_tag_frequency: {'x' * 120}... (500 characters)" in found.sections["header"]
    (ignored,) = found.sections["ignored keys"]
    assert "OFT changes the base's weights by a factor" in ignored
    matrices = found.to_dict()["networks"]["unet"]
    assert matrices["down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"] == {"rank": 2, "alpha": 1.0}
    assert matrices["down_blocks.1.resnets.0.conv1"]["kind"] == "LoHa"


@pytest.mark.parametrize(
    ("stem", "header", "named"),
    [
        (
            "lora_unet_double_blocks_0_img_mlp_fc1",
            {},
            "HunyuanVideo (told by the names of its matrices)",
        ),
        ("diffusion_model.blocks.0.self_attn.q", {"ss_base_model_version": "wan2.1"}, "Wan (its header"),
        (
            "unet.some.other.block.to_q",
            {"modelspec.architecture": "auraflow/lora"},
            "auraflow/lora (its header says 'auraflow/lora')",
        ),
    ],
)
def test_a_file_for_a_network_of_another_kind_names_both_bases(
    stem: str, header: dict[str, str], named: str, tmp_path: Path
) -> None:
    """Also where its text encoder is one that is known."""
    text = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    state = {}
    for name in (stem, text):
        state |= {f"{name}.lora_down.weight": torch.ones(2, 8), f"{name}.lora_up.weight": torch.ones(6, 2)}
    save_file(state, tmp_path / "dog.safetensors", metadata=header)
    for base, here in (
        (None, f"the bases known here are {SD1}, {SD2}, "),
        (Base(SD1, None), f"the base here is {SD1}."),
    ):
        with pytest.raises(ExpertLoadError) as caught:
            load_expert(tmp_path / "dog.safetensors", base=base)
        assert f"Expert 'dog' was made for {named}" in str(caught.value)
        assert here in str(caught.value)
    # A matrix of a known denoiser says that the rest is something else.
    known = {f"{QUERY}.lora_A.weight": torch.ones(1, 32), f"{QUERY}.lora_B.weight": torch.ones(32, 1)}
    expert = Expert.from_state_dict(state | known, name="dog", metadata=header)
    assert set(expert.factors) == {"unet", "text_encoder"}


@pytest.mark.parametrize(
    ("stem", "theirs", "other"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv", "FLUX.1 or Chroma", SD1),
        ("transformer.single_transformer_blocks.0.attn.to_q", "FLUX.1 or Chroma", SDXL),
        (f"unet.{QUERY}", f"{SD1} or {SD2} or ", FLUX1),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", "Stable Diffusion 3", FLUX1),
    ],
)
def test_a_file_for_a_known_network_of_another_kind_names_both_bases(
    stem: str, theirs: str, other: str, tmp_path: Path
) -> None:
    state = {f"{stem}.lora_down.weight": torch.ones(2, 8), f"{stem}.lora_up.weight": torch.ones(6, 2)}
    save_file(state, tmp_path / "dog.safetensors")
    assert load_expert(tmp_path / "dog.safetensors").factors
    base = Base(other, None)
    with pytest.raises(ExpertLoadError, match=rf"made for {theirs}.*; the base here is {other}\."):
        load_expert(tmp_path / "dog.safetensors", base=base)
    model = "some-model-with-a-name-of-several-words/lora"
    save_file(state, tmp_path / "dog.safetensors", metadata={"modelspec.architecture": model + 99 * " more"})
    said = rf"{theirs}.* \(its header says '{model}[more ]{{9,40}}'\); the base here is {other}\."
    with pytest.raises(ExpertLoadError, match=said):
        load_expert(tmp_path / "dog.safetensors", base=base)


def test_the_base_of_a_network() -> None:
    with torch.device("meta"):
        unet = make_family("sdxl", full=True)
    found = base_of_networks({"text_encoder": make_clip(), "unet": unet})
    assert str(found) == f"{SDXL} (cross-attention to text of width 2048)"
    assert base_of_networks({"text_encoder": make_clip(), "other": nn.Linear(2, 2)}) is None


def test_new_input_channels_are_left_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    """A LoCon of a base with four latent channels on one with nine (inpainting), LoRA and DoRA."""
    four, nine = make_inpainting(4), make_inpainting(9)
    same = four.state_dict()
    same["conv_in.weight"] = torch.cat([same["conv_in.weight"], torch.randn(16, 5, 3, 3)], dim=1)
    nine.load_state_dict(same)
    down, up = torch.randn(2, 4, 3, 3) * 0.3, torch.randn(16, 2, 1, 1) * 0.3
    state = {"unet.conv_in.lora_A.weight": down, "unet.conv_in.lora_B.weight": up}
    for extra in ({}, {"unet.conv_in.dora_scale": torch.rand(16, 1, 1, 1) + 0.5}):
        expert = Expert.from_state_dict(state | extra, name="dog")
        mixture = inject(nine, [expert], MoLEConfig())
        [factors] = mixture.groups[0].slots[0].factors.values()
        delta = factors.delta().view(16, 9, 3, 3)
        assert torch.all(delta[:, 4:] == 0)
        alone = inject(four, [expert], MoLEConfig())
        [own] = alone.groups[0].slots[0].factors.values()
        torch.testing.assert_close(delta[:, :4].flatten(1), own.delta(), rtol=1e-5, atol=1e-6)
        x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
        with torch.no_grad():
            found = nine(torch.cat([x, torch.zeros(1, 5, 8, 8)], dim=1), torch.tensor(5), text).sample
            torch.testing.assert_close(found, four(x, torch.tensor(5), text).sample, rtol=1e-4, atol=1e-5)
        mixture.eject()
        alone.eject()
    assert "Expert 'dog' knows 4 of the 9 input channels of 'conv_in' in this network" in caplog.text
    wide = {**state, "unet.conv_in.lora_A.weight": torch.randn(2, 9, 3, 3)}
    expert = Expert.from_state_dict(wide, name="dog")
    with pytest.raises(InjectionError, match=r"'conv_in': its delta is 16 x 81, the matrix 16 x 36"):
        inject(four, [expert], MoLEConfig())


def make_inpainting(channels: int) -> UNet2DConditionModel:
    torch.manual_seed(1)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    ).eval()


@pytest.mark.parametrize(
    ("header", "writer"),
    [
        (
            {"software": '{"name": "ai-toolkit", "version": "0.9.11"}', "ss_output_name": "x"},
            "ai-toolkit 0.9.11",
        ),
        ({"ot_revision": "1", "ss_base_model_version": "sdxl"}, "OneTrainer"),
        ({"ss_network_module": "networks.lora_zimage"}, "kohya's scripts (networks.lora_zimage)"),
        ({"ss_network_module": "lycoris.kohya"}, "LyCORIS in kohya's scripts (lycoris.kohya)"),
        ({"ss_output_name": "x"}, "kohya's scripts, or a program that writes like them"),
        ({"lora_adapter_metadata": "{}"}, "diffusers"),
        ({"mole.experts": "[]", "ss_network_module": "x"}, "mole_diffusion"),
        ({"software": "{"}, None),
        ({"software": '{"name": ' + f'"{"x" * 90}"' + "}"}, "x" * 60),
        ({}, None),
    ],
)
def test_who_wrote_a_file_by_its_header(header: dict[str, str], writer: str | None) -> None:
    assert writer_of(header) == writer
