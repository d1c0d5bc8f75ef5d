"""A transformer in one file, its text encoders and autoencoder from a folder; nothing is asked of a hub."""

import shutil
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from pipeline_helpers import CLOSE
from safetensors.torch import save_file
from tiny.denoising import FAMILIES
from tiny.flux import make_flux_components, write_transformer_lora

from mole_diffusion import ConfigError, FluxMoLEPipeline
from mole_diffusion.pictures.opening import open_base


def draw(pipe: Any, **given: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 1, "output_type": "pt", "height": 32, "width": 32, **given}
    pictures: torch.Tensor = pipe(
        prompt="a boot", generator=torch.Generator().manual_seed(1), **options
    ).images
    return pictures


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refused)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("offline")
def test_opens_offline_with_a_folder_for_the_rest(family: str, tmp_path: Path) -> None:
    """Under the names of diffusers: it reads the makers' at the real models' widths alone."""
    known = FAMILIES[family]
    cls, make, targets = known.cls, known.make, known.targets
    components = make(tmp_path / "words")
    lora = write_transformer_lora(tmp_path / "boot.safetensors", components, 1, 2, targets)
    folder = tmp_path / "model"
    cls.diffusers_class(**components).save_pretrained(folder)
    weights = {name: value.contiguous() for name, value in components["transformer"].state_dict().items()}
    save_file(weights, tmp_path / "transformer.safetensors")
    expected = open_base(str(folder))
    expected.load_expert(lora)
    picture = draw(expected)
    assert (picture - draw(expected, mixture="none")).abs().max() > 1e-3
    found = [cls.from_single_file(tmp_path / "transformer.safetensors", config=str(folder))]
    # Where the folder has other weights, the file in it counts.
    for file in (folder / "transformer").glob("*.safetensors"):
        save_file({name: value * 0 for name, value in weights.items()}, file)
    shutil.move(tmp_path / "transformer.safetensors", folder / "mine.safetensors")
    found.append(open_base(str(folder / "mine.safetensors")))
    for pipe in found:
        assert type(pipe) is cls
        pipe.load_expert(lora)
        torch.testing.assert_close(draw(pipe), picture, **CLOSE)


@pytest.mark.usefixtures("offline")
def test_components_of_ones_own_and_types_count(tmp_path: Path) -> None:
    components = make_flux_components(tmp_path / "words")
    FluxMoLEPipeline.diffusers_class(**components).save_pretrained(tmp_path / "model")
    file = tmp_path / "transformer.safetensors"
    save_file({name: one.contiguous() for name, one in components["transformer"].state_dict().items()}, file)
    rest = {name: one for name, one in components.items() if name != "transformer"}
    pipe = FluxMoLEPipeline.from_single_file(
        str(file), config=str(tmp_path / "model"), local_files_only=True, torch_dtype=torch.bfloat16, **rest
    )
    assert pipe.vae is components["vae"]
    assert pipe.transformer.dtype == torch.bfloat16


def test_a_file_of_the_makers_says_what_else_is_needed(tmp_path: Path) -> None:
    for name in ("double_blocks.0.img_attn.qkv", "layers.0.attention.qkv", "net.blocks.0.self_attn.q_proj"):
        file = tmp_path / "transformer.safetensors"
        save_file({f"{name}.weight": torch.zeros(6, 2)}, file)
        with pytest.raises(ConfigError, match=r"from_single_file\(..., config=FOLDER\)"):
            open_base(str(file))


def test_what_diffusers_reads_from_no_file_is_said(tmp_path: Path) -> None:
    folder, file = tmp_path / "model", tmp_path / "mine.safetensors"
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    save_file({"transformer_blocks.0.attn.to_q.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(
        ConfigError, match=r"has no transformer/config.json, which 'mine.safetensors' goes by"
    ):
        FluxMoLEPipeline.from_single_file(file, config=str(folder))
    (folder / "transformer" / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
    with pytest.raises(ConfigError, match="diffusers opens no DiTTransformer2DModel from one file"):
        FluxMoLEPipeline.from_single_file(file, config=str(folder))
