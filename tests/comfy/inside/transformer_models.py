"""Tiny transformers of ComfyUI with the weights of those of diffusers."""

import json
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import comfy.utils
import torch
from safetensors.torch import load_file
from torch import Tensor


def load_flux(folder: Path, kind: str) -> Any:
    """A MODEL of a diffusers FLUX.1 or Chroma; see `oracle_flux.py`."""
    config = json.loads((folder / "config.json").read_text())
    width = config["num_attention_heads"] * config["attention_head_dim"]
    settings: dict[str, Any] = {
        "image_model": kind,
        "in_channels": config["in_channels"] // 4,
        "out_channels": config["in_channels"] // 4,
        "hidden_size": width,
        "context_in_dim": config["joint_attention_dim"],
        "num_heads": config["num_attention_heads"],
        "depth": config["num_layers"],
        "depth_single_blocks": config["num_single_layers"],
        "axes_dim": list(config["axes_dims_rope"]),
        "mlp_ratio": 4.0,
        "theta": 10000,
        "patch_size": 2,
        "qkv_bias": True,
    }
    names = comfy.utils.flux_to_diffusers(settings)
    if kind == "chroma":
        settings |= {"in_dim": 64, "out_dim": width, "hidden_dim": config["approximator_hidden_dim"]}
        settings |= {"n_layers": config["approximator_layers"], "in_channels": config["in_channels"]}
        settings |= {"out_channels": config["in_channels"]}
        model_config = comfy.supported_models.Chroma(settings)
        names |= _approximator(config["approximator_layers"])
    else:
        settings |= {"guidance_embed": True, "vec_in_dim": config["pooled_projection_dim"]}
        model_config = comfy.supported_models.Flux(settings)
    model_config.set_inference_dtype(torch.float32, None)
    model = model_config.get_model({}, device=torch.device("cpu"))
    weights = load_file(folder / "weights.safetensors")
    state = converted(weights, names, model.diffusion_model.state_dict())
    model.diffusion_model.load_state_dict(state)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def _approximator(layers: int) -> dict[str, Any]:
    """Names of Chroma's approximator, which `flux_to_diffusers` does not have."""
    home, found = "distilled_guidance_layer", {}
    for end in ("weight", "bias"):
        for name in ("in_proj", "out_proj"):
            found[f"{home}.{name}.{end}"] = f"{home}.{name}.{end}"
        for layer in range(layers):
            for ours, theirs in (("in_layer", "linear_1"), ("out_layer", "linear_2")):
                found[f"{home}.layers.{layer}.{theirs}.{end}"] = f"{home}.layers.{layer}.{ours}.{end}"
    for layer in range(layers):
        found[f"{home}.norms.{layer}.weight"] = f"{home}.norms.{layer}.scale"
    return found


def converted(
    weights: dict[str, Tensor], names: dict[str, Any], like: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Weights of diffusers under ComfyUI's names, every one of them used."""
    state = {name: torch.full_like(value, float("nan")) for name, value in like.items()}
    for name, value in weights.items():
        place = names[name]
        key, part, change = (*place, None)[:3] if isinstance(place, tuple) else (place, None, None)
        value = value if change is None else change(value)
        if part is None:
            state[key] = value
        else:
            state[key].narrow(*part).copy_(value)
    wrong = [name for name, value in state.items() if torch.isnan(value).any()]
    assert not wrong, wrong
    return state
