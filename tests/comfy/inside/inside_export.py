"""A mixture that was exported as one plain LoRA, in ComfyUI's stock LoraLoader."""

import json
from pathlib import Path
from typing import Any

import nodes
import torch
from conftest import part
from safetensors import safe_open
from safetensors.torch import load_file

from mole_diffusion.core.experts import load_expert
from mole_diffusion.starter import starter_experts
from tools import draw

PROMPT = "a zorin boot, a vekka monster and a kipra clock on the beach"


def test_stock_lora_loader_draws_the_picture_that_diffusers_draws(
    starter: tuple[Any, Any, Any], oracle: Path, monkeypatch: Any
) -> None:
    model, clip, vae = starter
    # The node looks names up in ComfyUI's folder of LoRAs.
    monkeypatch.setattr("folder_paths.get_full_path_or_raise", lambda kind, name: str(oracle / name))
    loaded, loaded_clip = nodes.LoraLoader().load_lora(model, clip, "static.safetensors", 1.0, 1.0)
    expected = load_file(oracle / "static_picture.safetensors")
    picture = vae.decode(draw(loaded, loaded_clip, PROMPT, seed=1, steps=10)).movedim(-1, 1)
    assert (picture - expected["picture"]).abs().max() < 1e-3
    assert (picture - expected["base_picture"]).abs().mean() > 0.02


def test_the_node_writes_what_the_pipeline_writes(starter: tuple[Any, Any, Any], tmp_path: Path) -> None:
    """Strengths of Mask Experts are inside; the header has the grammar of all our files."""
    model, clip, _ = starter
    chosen = part("experts").ExpertSet((load_expert(starter_experts()["boot"].path),))
    found = {}
    for name, strengths in (("whole", {}), ("half", {"boot": 0.5})):
        mixed, mixed_clip = part("apply").apply_experts(model, clip, chosen.masked(None, strengths), None)
        draw(mixed, mixed_clip, PROMPT)
        path = tmp_path / f"{name}.safetensors"
        said = part("export").export_lora(part("apply").applied_to(mixed), path, None)
        assert said.startswith(f"{name}.safetensors: ")
        found[name] = load_file(path)
    for key, whole in found["whole"].items():
        share = 0.5 if key.endswith("lora_up.weight") else 1.0
        torch.testing.assert_close(found["half"][key], share * whole)
    with safe_open(tmp_path / "whole.safetensors", framework="pt") as file:
        header = file.metadata()
    assert header["prediction_type"] == part("binding").facts_of(model)["prediction_type"]
    assert [one["name"] for one in json.loads(header["mole.experts"])] == ["boot"]
    assert header["mole.kind"] == "static mixture"
