"""Transformers on the command line: told by the folder, drawn, trained, exported and inspected."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny.flux import (
    FLUX_TARGETS,
    make_chroma_components,
    make_flux_components,
    write_transformer_lora,
)
from typer.testing import CliRunner

from mole_diffusion import ChromaMoLEPipeline, ConfigError, FluxMoLEPipeline
from mole_diffusion.cli import app
from mole_diffusion.pictures.opening import open_base


def run(*arguments: Any) -> Any:
    environment = {"COLUMNS": "200", "NO_COLOR": "1"}
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)


@pytest.fixture(scope="module", params=[FluxMoLEPipeline, ChromaMoLEPipeline])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path, list[Path]]:
    """Our class, a folder that diffusers saved, and two LoRA files."""
    folder = tmp_path_factory.mktemp("model")
    flux = request.param is FluxMoLEPipeline
    components = make_flux_components(folder / "words") if flux else make_chroma_components()
    files = [
        write_transformer_lora(folder / f"{name}.safetensors", components, seed, 2, FLUX_TARGETS)
        for seed, name in enumerate(("boot", "cat"), 1)
    ]
    request.param.diffusers_class(**components).save_pretrained(folder / "model")
    return request.param, folder / "model", files


def test_generate_and_export(model: tuple[Any, Path, list[Path]], tmp_path: Path) -> None:
    cls, folder, files = model
    chosen = ["--model", folder, "-e", files[0], "-e", files[1]]
    out = tmp_path / "picture.png"
    options = ["--steps", 2, "--guidance", 3, "--seed", 5, "--size", "48x32", "--out", out, "--json"]
    result = run("generate", "a boot and a cat", *chosen, *options)
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)["weights"]) == {"boot", "cat"}
    pipe = open_base(str(folder))
    assert type(pipe) is cls
    for file in files:
        pipe.load_expert(file)
    expected = pipe(
        "a boot and a cat", height=32, width=48, num_inference_steps=2, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5),
    ).images[0]  # fmt: skip
    difference = np.asarray(Image.open(out), dtype=int) - np.asarray(expected, dtype=int)
    assert np.abs(difference).max() <= 1


def test_inspect(model: tuple[Any, Path, list[Path]]) -> None:
    result = run("inspect", model[2][0], "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert "FLUX.1" in json.dumps(told)
    assert list(told["networks"]) == ["transformer"]


def test_what_cannot_be_opened_is_said(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "SanaPipeline", "transformer": ["diffusers", "SanaTransformer2DModel"]})
    )
    with pytest.raises(ConfigError, match="it is a SanaPipeline, and experts are for StableDiff"):
        open_base(str(tmp_path))
    file = tmp_path / "flux.safetensors"
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(6, 2)}, file)
    with pytest.raises(ConfigError, match="the file holds a transformer, whose text encoders"):
        open_base(str(file))
