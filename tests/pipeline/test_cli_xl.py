"""SDXL on the command line, and from a checkpoint in one file."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from ldm_checkpoint import same_weights, write_sdxl_checkpoint
from PIL import Image
from pipeline_helpers import build
from typer.testing import CliRunner

from mole_diffusion import StableDiffusionXLMoLEPipeline
from mole_diffusion.cli import app


def run(*arguments):
    environment = {"COLUMNS": "200", "NO_COLOR": "1"}
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)


@pytest.fixture(scope="module")
def model(tmp_path_factory, xl_components):
    folder = tmp_path_factory.mktemp("xl_model")
    build(StableDiffusionXLPipeline, xl_components).save_pretrained(folder)
    return folder


def test_generate_and_export(model, xl_loaded, xl_plain, xl_lora_files, tmp_path) -> None:
    chosen = ["--model", model, "-e", xl_lora_files["boot"], "-e", xl_lora_files["cat"]]
    out = tmp_path / "picture.png"
    result = run(
        *(
            "generate",
            "a boot and a cat",
            *chosen,
            "--steps",
            2,
            "--guidance",
            3,
            "--seed",
            5,
            "--size",
            "40x24",
        ),
        *("--out", out, "--json"),
    )
    assert result.exit_code == 0, result.output
    expected = xl_loaded(
        "a boot and a cat", height=24, width=40, num_inference_steps=2, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5),
    ).images[0]  # fmt: skip
    difference = np.asarray(Image.open(out), dtype=int) - np.asarray(expected, dtype=int)
    assert np.abs(difference).max() <= 1
    file = tmp_path / "both.safetensors"
    result = run("export", file, "a boot and a cat", *chosen, "--steps", 1, "--format", "kohya", "--json")
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)["ranks"]) == {"unet", "text_encoder", "text_encoder_2"}
    xl_plain.load_lora_weights(file)
    result = run("inspect", file)
    assert result.exit_code == 0, result.output
    assert "text_encoder_2" in result.output


def test_from_single_file(model, xl_plain, xl_loaded, xl_lora_files, draw, tmp_path) -> None:
    """A whole SDXL checkpoint, with its second text encoder under OpenCLIP's names, takes experts."""
    file = write_sdxl_checkpoint(tmp_path / "xl.safetensors", xl_plain)
    ours = StableDiffusionXLMoLEPipeline.from_single_file(str(file), config=str(model), local_files_only=True)
    ours.set_progress_bar_config(disable=True)
    assert type(ours) is StableDiffusionXLMoLEPipeline
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        assert same_weights(getattr(ours, part), getattr(xl_plain, part)), part
    for name, path in xl_lora_files.items():
        ours.load_expert(path, name=name)
    torch.testing.assert_close(draw(ours), draw(xl_loaded), rtol=0, atol=0)


def test_an_expert_is_trained_on_both_text_encoders(model, xl_components, xl_plain, draw, tmp_path) -> None:
    """The file is an expert of the very networks, and diffusers draws the same with it."""
    pictures, out = tmp_path / "pictures", tmp_path / "boot.safetensors"
    pictures.mkdir()
    for x in (4, 12):
        picture = Image.new("RGB", (32, 32), (200, 220, 250))
        picture.paste((220, 20, 30), (x, 8, x + 14, 22))
        picture.save(pictures / f"{x}.png")
    small = ["--steps", 12, "--batch", 2, "--rank", 2, "--rate", 0.02]
    result = run("train-expert", pictures, "a red boot", "--model", model, *small, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["steps"] == 12
    pipe = build(StableDiffusionXLMoLEPipeline, xl_components)
    base = draw(pipe, "a red boot")
    expert = pipe.load_expert(out)
    assert set(expert.factors) == {"unet", "text_encoder", "text_encoder_2"}
    assert not expert.report.ignored
    # Every network has learnt; of the text encoders the last layer is not read.
    learnt = {
        part: max(float(f.up.abs().max()) for f in own.values()) for part, own in expert.factors.items()
    }
    assert min(learnt.values()) > 0, learnt
    ours = draw(pipe, "a red boot")
    assert (ours - base).abs().max() > 1e-3
    xl_plain.load_lora_weights(out)
    torch.testing.assert_close(draw(xl_plain, "a red boot"), ours, rtol=0, atol=1e-3)
