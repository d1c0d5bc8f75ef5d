"""`mole baseline`, and `mole generate --mixture` with what it writes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from typer.testing import CliRunner, Result

from mole_diffusion.cli import app
from mole_diffusion.methods import load_prepared

PROMPT = "a zorin boot a vim cat"


def run(*arguments: Any) -> Result:
    environment = {"COLUMNS": "200", "NO_COLOR": "1"}
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, components: dict[str, Any]) -> Path:
    """The tiny networks as diffusers saves them."""
    folder = tmp_path_factory.mktemp("model")
    StableDiffusionPipeline(**components, requires_safety_checker=False).save_pretrained(folder)
    return folder


@pytest.fixture
def options(model: Path, lora_files: dict[str, Path]) -> list[Any]:
    return ["--model", model, "-e", lora_files["boot"], "-e", f"{lora_files['cat']}=0.5"]


@pytest.fixture
def ours(empty: Any, lora_files: dict[str, Path]) -> Any:
    """The pipeline that `options` describe."""
    empty.load_expert(lora_files["boot"])
    empty.load_expert(lora_files["cat"], scale=0.5)
    return empty


def test_prepares_and_draws(ours, options, tmp_path) -> None:
    folder, picture = tmp_path / "ties", tmp_path / "picture.png"
    result = run("baseline", "ties", *options, "--density", 0.5, "--out", folder)
    assert result.exit_code == 0, result.output
    assert f"--mixture {folder}" in result.output
    prepared = load_prepared(folder)
    assert prepared.details == {"weights": {"boot": 1.0, "cat": 0.5}, "density": 0.5}
    result = run(
        *("generate", PROMPT, *options, "--mixture", folder, "--steps", 2, "--guidance", 3),
        *("--seed", 5, "--out", picture, "--json"),
    )
    assert result.exit_code == 0, result.output
    expected = ours(
        PROMPT,
        mixture=prepared,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    assert np.array_equal(np.asarray(Image.open(picture)), np.asarray(expected))


@pytest.mark.parametrize("word", ["switch", "composite"])
def test_generate_knows_the_words(ours, options, tmp_path, word) -> None:
    picture = tmp_path / "picture.png"
    result = run(
        *("generate", PROMPT, *options, "--mixture", word, "--steps", 2, "--guidance", 3, "--out", picture)
    )
    assert result.exit_code == 0, result.output
    expected = ours(
        PROMPT,
        mixture=word,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert np.array_equal(np.asarray(Image.open(picture)), np.asarray(expected))


def test_trains_concepts_from_a_folder_of_pictures(options, concepts, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("boot", "cat"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        concepts[name].references[0].save(tmp_path / "pictures" / name / "1.png")
    result = run(
        *("baseline", "textual_inversion", *options, "--steps", 2, "--references", tmp_path / "pictures"),
        *("--concept", "boot=a zorin boot", "--concept", "cat=a vim cat", "--out", tmp_path / "ti", "--json"),
    )
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["unet_passes"] == {"with_gradient": 4, "without_gradient": 0}
    cached = tmp_path / "cache" / "mole_diffusion" / "concepts" / "textual_inversion"
    assert len(list(cached.glob("*.safetensors"))) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["baseline", "magic"], "method is 'magic', expected one of"),
        (["baseline", "switch"], "need none: mole generate ... --mixture switch"),
        (["baseline", "ties", "--density", "2"], "density is 2.0"),
        (["baseline", "ties", "--size", "512x768"], "'512x768'; these pictures are square: write 512"),
        (["generate", "a boot", "--mixture", "LA"], "'LA' is none of auto, gates"),
        (["generate", "a boot", "--mixture", "."], "there is no prepared baseline in"),
    ],
)
def test_refusals(arguments, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.output.split())
