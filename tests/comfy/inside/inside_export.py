"""A mixture that was exported as one plain LoRA, in ComfyUI's stock LoraLoader."""

from pathlib import Path
from typing import Any

import nodes
from safetensors.torch import load_file

from tools import draw

PROMPT = "a zor boot, a vek monster and a kip clock on the beach"


def test_stock_lora_loader_draws_the_picture_that_diffusers_draws(
    starter: tuple[Any, Any, Any], oracle: Path, monkeypatch: Any
) -> None:
    model, clip, vae = starter
    # The node looks names up in ComfyUI's folder of LoRAs.
    monkeypatch.setattr("folder_paths.get_full_path_or_raise", lambda kind, name: str(oracle / name))
    loaded, loaded_clip = nodes.LoraLoader().load_lora(model, clip, "static.safetensors", 1.0, 1.0)
    expected = load_file(oracle / "static_picture.safetensors")
    picture = vae.decode(draw(loaded, loaded_clip, PROMPT, seed=1, steps=10)).movedim(-1, 1)
    assert (picture - expected["picture"]).abs().max() < 0.02
    assert (picture - expected["picture"]).abs().mean() < 0.001
    assert (picture - expected["base_picture"]).abs().mean() > 0.02
