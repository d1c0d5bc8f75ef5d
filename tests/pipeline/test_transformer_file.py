"""A transformer in one file, its text encoders and autoencoder from a folder; nothing is asked of a hub."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from pipeline_helpers import CLOSE
from safetensors.torch import save_file
from tiny.flux import FLUX_TARGETS, make_chroma_components, make_flux_components, write_transformer_lora
from tiny.qwen import make_z_image_components

from mole_diffusion import ChromaMoLEPipeline, ConfigError, FluxMoLEPipeline, ZImageMoLEPipeline
from mole_diffusion.pictures.opening import open_base

# Our class, components, and what LoRA files change.
FAMILIES: dict[str, tuple[Any, Callable[[Path], dict[str, Any]], list[str]]] = {
    "flux": (FluxMoLEPipeline, make_flux_components, FLUX_TARGETS),
    "chroma": (ChromaMoLEPipeline, lambda _: make_chroma_components(), FLUX_TARGETS),
    "z-image": (
        ZImageMoLEPipeline,
        lambda _: make_z_image_components(),
        ["attention.to_q", "feed_forward.w2"],
    ),
}


def draw(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 1, "output_type": "pt", "height": 32, "width": 32}
    pictures: torch.Tensor = pipe("a boot", generator=torch.Generator().manual_seed(1), **options).images
    return pictures


@pytest.mark.parametrize("family", FAMILIES)
def test_opens_offline_with_a_folder_for_the_rest(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the names of diffusers: it reads the makers' at the real models' widths alone."""
    cls, make, targets = FAMILIES[family]
    components = make(tmp_path / "words")
    lora = write_transformer_lora(tmp_path / "boot.safetensors", components, 1, 2, targets)
    cls.diffusers_class(**components).save_pretrained(tmp_path / "model")
    file = tmp_path / "transformer.safetensors"
    save_file(
        {name: value.contiguous() for name, value in components["transformer"].state_dict().items()}, file
    )

    def refused(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refused)
    rest = {name: one for name, one in components.items() if name != "transformer"}
    found = cls.from_single_file(
        str(file), config=str(tmp_path / "model"), local_files_only=True, torch_dtype=torch.float32, **rest
    )
    assert type(found) is cls
    expected = open_base(str(tmp_path / "model"))
    pictures = []
    for pipe in (found, expected):
        pipe.load_expert(lora)
        pictures.append(draw(pipe))
    torch.testing.assert_close(*pictures, **CLOSE)
    assert (draw(found) - draw_base(found)).abs().max() > 1e-3


def draw_base(pipe: Any) -> torch.Tensor:
    with pipe.composing(mixture="none"):
        pictures: torch.Tensor = pipe.diffusers_class.__call__(
            pipe, "a boot", generator=torch.Generator().manual_seed(1), num_inference_steps=1,
            output_type="pt", height=32, width=32,
        ).images  # fmt: skip
    return pictures


def test_a_file_of_the_makers_says_what_else_is_needed(tmp_path: Path) -> None:
    file = tmp_path / "flux1-dev.safetensors"
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(6, 2)}, file)
    with pytest.raises(ConfigError, match=r"from_single_file\(..., text_encoder=..., vae=...\)"):
        open_base(str(file))
