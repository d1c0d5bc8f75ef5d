"""The mixture of an SDXL, and convolutions, as one plain LoRA: in diffusers and in this library."""

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from pipeline_helpers import build, train_a_little
from safetensors.torch import load_file, save_file
from test_export import EXACT, PROMPTS, STEPS, calibration_rows, merged

from mole_diffusion import MoLEConfig, StableDiffusionMoLEImg2ImgPipeline, StableDiffusionMoLEPipeline
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.keys import factor_keys, parse_key


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_sdxl_draws_the_static_mixture_from_the_file(
    xl_loaded, xl_components, draw, tmp_path, dialect
) -> None:
    train_a_little(xl_loaded)
    rows = calibration_rows(xl_loaded)
    expected = draw(merged(build(StableDiffusionXLPipeline, xl_components), xl_loaded, rows))
    path = tmp_path / "static.safetensors"
    report = xl_loaded.export_lora(path, dialect, prompts=PROMPTS, steps=STEPS)
    assert report.ranks == {"unet": 6, "text_encoder": 6, "text_encoder_2": 6}
    assert report.noise_difference > 0
    alone = xl_loaded.export_lora(path, dialect, prompts=PROMPTS[:1], steps=1, active_experts=["boot"])
    assert alone.noise_difference < 1e-5
    xl_loaded.export_lora(path, dialect, prompts=PROMPTS, steps=STEPS)
    plain = build(StableDiffusionXLPipeline, xl_components)
    before = draw(plain)
    plain.load_lora_weights(path)
    torch.testing.assert_close(draw(plain), expected, **EXACT)
    assert (before - expected).abs().max() > 0.01
    xl_loaded.eject()
    assert not xl_loaded.load_expert(path).report.ignored
    torch.testing.assert_close(draw(xl_loaded), expected, **EXACT)
    keys = set(load_file(path))
    layer = "encoder.layers.1.self_attn.q_proj"
    names = {
        "diffusers": [f"text_encoder{n}.text_model.{layer}.lora_A.weight" for n in ("", "_2")],
        "kohya": [f"lora_te{n}_text_model_{layer.replace('.', '_')}.lora_down.weight" for n in (1, 2)],
    }
    assert set(names[dialect]) <= keys


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_written_names_are_read_back(dialect: str) -> None:
    for network, matrix in [
        ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"),
        ("unet", "up_blocks.1.resnets.2.conv_shortcut"),
        ("text_encoder", "encoder.layers.0.mlp.fc1"),
        ("text_encoder_2", "encoder.layers.0.self_attn.out_proj"),
        ("text_encoder_2", "text_projection"),
    ]:
        for key in factor_keys(network, matrix, dialect, xl=True).values():
            parsed = parse_key(key)
            assert (parsed.network, parsed.matrix) == (network, matrix), key


def locon(unet: torch.nn.Module, seed: int, rank: int) -> dict[str, torch.Tensor]:
    """A LoRA of all convolutions and attention outputs, with kernels of every size and stride."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Conv2d) or name.endswith(("to_out.0", "time_emb_proj")):
            out, fan_in, *kernel = module.weight.shape
            tensors[f"unet.{name}.lora_A.weight"] = (
                torch.randn(rank, fan_in, *kernel, generator=generator) * 0.2
            )
            ones = [1 for _ in kernel]
            tensors[f"unet.{name}.lora_B.weight"] = torch.randn(out, rank, *ones, generator=generator) * 0.1
    return tensors


@pytest.fixture
def convolutional(components: dict[str, Any], tmp_path) -> StableDiffusionMoLEPipeline:
    pipe = build(StableDiffusionMoLEPipeline, components)
    for i, name in enumerate(("boot", "cat")):
        save_file(locon(pipe.unet, i, 2 + i), tmp_path / f"{name}.safetensors")
        pipe.load_expert(tmp_path / f"{name}.safetensors")
    train_a_little(pipe)
    return pipe


@pytest.mark.parametrize("rank", [None, 100])
def test_convolutions_of_any_kernel(convolutional, components, draw, tmp_path, rank) -> None:
    rows = calibration_rows(convolutional)
    expected = draw(merged(build(StableDiffusionPipeline, components), convolutional, rows))
    for dialect in ("diffusers", "kohya"):
        path = tmp_path / f"{dialect}.safetensors"
        report = convolutional.export_lora(path, dialect, prompts=PROMPTS, steps=STEPS, rank=rank)
        assert report.compression_error < 1e-5
        plain = build(StableDiffusionPipeline, components)
        plain.load_lora_weights(path)
        torch.testing.assert_close(draw(plain), expected, **EXACT)
    shapes = {key: tuple(t.shape) for key, t in load_file(tmp_path / "diffusers.safetensors").items()}
    assert shapes["unet.conv_in.lora_A.weight"] == (5, 4, 3, 3)
    assert shapes["unet.conv_in.lora_B.weight"] == (16, 5, 1, 1)


def test_gates_of_block_outputs_are_frozen_and_the_distance_is_told(loaded, tmp_path) -> None:
    """No LoRA mixes block outputs: the weights go to the matrices, and the report says what that costs."""
    loaded.configure(MoLEConfig(composition="output"))
    train_a_little(loaded)
    report = loaded.export_lora(tmp_path / "a.safetensors", prompts=PROMPTS, steps=STEPS)
    assert 0 < report.effect_difference < 2
    assert report.matrices > 0


def test_pipelines_that_draw_from_pictures_refuse(loaded, tmp_path) -> None:
    other = StableDiffusionMoLEImg2ImgPipeline.from_pipe(loaded)
    with pytest.raises(
        ConfigError, match="export_lora draws from text, and StableDiffusionMoLEImg2ImgPipeline"
    ):
        other.export_lora(tmp_path / "a.safetensors", prompts="a boot", steps=1)
    assert not (tmp_path / "a.safetensors").exists()
