"""Transformers on the command line: told by the folder, drawn, trained, exported and inspected."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny.denoising import FAMILIES
from tiny.flux import FLUX_TARGETS, write_transformer_lora
from typer.testing import CliRunner

from mole_diffusion import ConfigError
from mole_diffusion.app.metadata import read_settings
from mole_diffusion.cli import app
from mole_diffusion.pictures import pipelines
from mole_diffusion.pictures.components import guidance_arguments
from mole_diffusion.pictures.opening import from_picture, open_base


def run(*arguments: Any) -> Any:
    environment = {"COLUMNS": "200", "NO_COLOR": "1"}
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)


TARGETS = [
    *(target for target in FLUX_TARGETS if target != "proj_out"),
    *(
        "attn.to_qkv_mlp_proj",
        "attn.to_gate",
        "attn2.to_k",
        "txt_mlp.net.2",
        "attention.to_q",
        "attention.to_out.0",
        "feed_forward.w1",
    ),
]


@dataclass(frozen=True)
class Model:
    """Our class, a folder that diffusers saved, two LoRA files, and the family's name."""

    cls: Any
    folder: Path
    files: list[Path]
    family: str

    @property
    def options(self) -> list[Any]:
        return ["--model", self.folder, "-e", self.files[0], "-e", self.files[1]]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("model")
    known = FAMILIES[request.param]
    components = known.make(folder / "words")
    files = [
        write_transformer_lora(folder / f"{name}.safetensors", components, seed, 2, TARGETS)
        for seed, name in enumerate(("boot", "cat"), 1)
    ]
    known.cls.diffusers_class(**components).save_pretrained(folder / "model")
    return Model(known.cls, folder / "model", files, known.name)


def test_generate(model: Model, tmp_path: Path) -> None:
    out = tmp_path / "picture.png"
    drawn = ["--steps", 2, "--guidance", 3, "--seed", 5, "--size", "48x32", "--out", out, "--json"]
    result = run("generate", "a boot and a cat", *model.options, *drawn)
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)["weights"]) == {"boot", "cat"}
    pipe = open_base(str(model.folder))
    assert type(pipe) is model.cls
    for file in model.files:
        pipe.load_expert(file)
    expected = pipe(
        prompt="a boot and a cat", height=32, width=48, num_inference_steps=2,
        generator=torch.Generator().manual_seed(5), **guidance_arguments(pipe, 3.0),
    ).images[0]  # fmt: skip
    difference = np.asarray(Image.open(out), dtype=int) - np.asarray(expected, dtype=int)
    assert np.abs(difference).max() <= 1


def test_training_and_export(model: Model, tmp_path: Path) -> None:
    """Gates of two iterations, drawn with, and frozen into one file that diffusers draws with."""
    texts = ["--concept", "boot=a red boot|a boot", "--concept", "cat=a dull cat"]
    small = {"resolution": 32, "sampling_steps": 2, "pool_size": 2, "drawn_pictures": 1, "guidance": 2.0}
    settings = [word for name, value in small.items() for word in ("--set", f"{name}={value}")]
    command = ["train-gates", "a red boot and a dull cat", *model.options, *texts, "--out", tmp_path / "run"]
    result = run(*command, "--iterations", 2, "--batch", 2, *settings, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["iteration"] == 2
    assert set(told["weights"]) == {"boot", "cat"}
    file = tmp_path / "both.safetensors"
    options = [*model.options, "--gates", told["gates"], "--steps", 2, "--size", 32]
    result = run("export", file, "a red boot", *options, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["experts"] == ["boot", "cat"]
    drawn = ["--steps", 1, "--size", 32, "--out", tmp_path / "picture.png", "--json"]
    result = run("generate", "a red boot", *model.options, "--gates", told["gates"], *drawn)
    assert result.exit_code == 0, result.output
    assert read_settings(tmp_path / "picture.png").gates == "trained"
    result = run("inspect", told["gates"], "--json")
    assert [one["name"] for one in json.loads(result.stdout)["experts"]] == ["boot", "cat"]
    plain = model.cls.diffusers_class.from_pretrained(model.folder)
    plain.load_lora_weights(file)
    result = run("inspect", file, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["base"]["family"] == model.family


def test_inspect(model: Model) -> None:
    result = run("inspect", model.files[0], "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["base"]["family"] == model.family
    assert list(told["networks"]) == ["transformer"]


def test_a_picture_to_begin_from_has_the_size_that_is_asked_for(model: Model, tmp_path: Path) -> None:
    begin, out = tmp_path / "begin.png", tmp_path / "picture.png"
    Image.new("RGB", (96, 64), (200, 90, 30)).save(begin)
    drawn = ["--steps", 2, "--guidance", 2, "--seed", 5, "--size", "48x32", "--out", out]
    result = run("generate", "a boot and a cat", *model.options, "--image", begin, *drawn)
    if not hasattr(pipelines, model.cls.__name__.replace("MoLE", "MoLEImg2Img")):
        assert result.exit_code == 1
        assert f"{model.cls.__name__} does not begin from a picture" in result.output
        return
    assert result.exit_code == 0, result.output
    pipe = open_base(str(model.folder))
    for file in model.files:
        pipe.load_expert(file)
    pipe = from_picture(pipe)
    expected = pipe(
        prompt="a boot and a cat", image=Image.open(begin).resize((48, 32)), strength=0.6,
        height=32, width=48, num_inference_steps=2,
        generator=torch.Generator().manual_seed(5), **guidance_arguments(pipe, 2.0),
    ).images[0]  # fmt: skip
    found = Image.open(out)
    assert found.size == (48, 32)
    assert np.abs(np.asarray(found, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # nevergrad's own dependencies warn
@pytest.mark.parametrize("model", ["z-image"], indirect=True)
def test_weights_are_searched_on_pictures_of_a_size(model: Model, tmp_path: Path) -> None:
    pytest.importorskip("nevergrad")
    pictures = tmp_path / "pictures"
    for name, colour in (("boot", "red"), ("cat", "grey")):
        (pictures / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), colour).save(pictures / name / "1.png")
    texts = ["--concept", "boot=a red boot|a boot", "--concept", "cat=a dull cat"]
    command = ["baseline", "searched", "a red boot and a dull cat", *model.options, *texts]
    command += ["--references", pictures, "--iterations", 24, "--out", tmp_path / "found", "--json"]
    result = run(*command, "--size", "32x48")
    assert result.exit_code == 2
    assert "these pictures are square" in result.output
    result = run(*command, "--size", 32)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert set(told["details"]["mixture"]) == {"boot", "cat"}
    drawn = ["--steps", 1, "--size", 32, "--mixture", tmp_path / "found", "--out", tmp_path / "picture.png"]
    result = run("generate", "a red boot and a dull cat", *model.options, *drawn)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("model", ["flux", "z-image"], indirect=True)
def test_gates_without_training_are_there_for_who_asks(model: Model, tmp_path: Path) -> None:
    drawn = {}
    for mixture in ("auto", "freefuse", "nla"):
        file = tmp_path / f"{mixture}.png"
        options = ["--mixture", mixture, "--steps", 2, "--size", 32, "--out", file]
        result = run("generate", "a boot and a cat", *model.options, *options)
        assert result.exit_code == 0, result.output
        drawn[mixture] = Image.open(file).tobytes()
    assert len(set(drawn.values())) == len(drawn)


@pytest.mark.parametrize("model", ["flux", "z-image"], indirect=True)
def test_what_is_for_a_unet_is_said_in_a_sentence(model: Model, tmp_path: Path) -> None:
    drawn = ["--steps", 1, "--size", 32, "--out", tmp_path / "picture.png"]
    for option, sentence in {
        ("--mixture", "switch"): "takes turns in the forwards of a UNet",
        ("--mixture", "composite"): "takes turns in the forwards of a UNet",
        ("--mixture", "loratorio"): "needs experts that change a UNet",
        ("--sampler", "DDIM"): "this model draws with its own",
    }.items():
        result = run("generate", "a boot and a cat", *model.options, *option, *drawn)
        assert result.exit_code == 1, result.output
        assert sentence in result.output
    pictures = tmp_path / "boot"
    pictures.mkdir()
    Image.new("RGB", (32, 32)).save(pictures / "1.png")
    result = run("train-expert", pictures, "a sks boot", "--model", model.folder)
    assert result.exit_code == 1, result.output
    assert f"trained here on Stable Diffusion 1, 2 and XL, and {model.cls.__name__} is none" in result.output
    for method in ("textual_inversion", "custom_diffusion"):
        texts = ["--concept", "boot=a red boot|a boot", "--concept", "cat=a dull cat"]
        result = run("baseline", method, *model.options, *texts, "--out", tmp_path / method)
        assert result.exit_code == 1, result.output
        assert f"{method!r} is for Stable Diffusion 1 and 2" in result.output


def test_what_cannot_be_opened_is_said(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "SanaPipeline", "transformer": ["diffusers", "SanaTransformer2DModel"]})
    )
    with pytest.raises(ConfigError, match="it is a SanaPipeline, and experts are for StableDiff"):
        open_base(str(tmp_path))
    file = tmp_path / "else" / "where" / "flux.safetensors"
    file.parent.mkdir(parents=True)
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(6, 2)}, file)
    with pytest.raises(ConfigError, match="the file holds a transformer, whose text encoders"):
        open_base(str(file))
