"""LoRA files for the models of `tiny_models`."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

_BLOCKS = ("down_blocks_1_attentions_0_transformer_blocks_0", "mid_block_attentions_0_transformer_blocks_0")
_LAYERS = ("self_attn_q_proj", "self_attn_v_proj")
# Matrix -> width in and out, under the makers' names.
_FLUX = {
    **{f"double_blocks.{block}.{stream}_attn.qkv": (32, 96) for block in (0, 1) for stream in ("img", "txt")},
    **{f"single_blocks.{block}.linear1": (32, 224) for block in (0, 1)},
}
_Z_IMAGE = {
    **{f"layers.{block}.attention.qkv": (288, 864) for block in (0, 1)},
    "context_refiner.0.attention.qkv": (288, 864),
}


def write_xl_lora(folder: Path, name: str, seed: int) -> Path:
    """Under kohya's names: factors for the UNet and both text encoders; the file says its trigger words."""
    shapes = {f"unet_{block}_{matrix}": 64 for block in _BLOCKS for matrix in ("attn1_to_q", "attn2_to_k")}
    for encoder in ("te1", "te2"):
        shapes |= _text_encoder(encoder)
    return _write(folder, name, seed, {f"lora_{key}": (width, width) for key, width in shapes.items()})


def write_flux_lora(folder: Path, name: str, seed: int) -> Path:
    """Under kohya's names: factors for the transformer and CLIP."""
    shapes = {f"lora_unet_{key.replace('.', '_')}": shape for key, shape in _FLUX.items()}
    shapes |= {f"lora_{key}": (width, width) for key, width in _text_encoder("te1").items()}
    return _write(folder, name, seed, shapes)


def write_z_image_lora(folder: Path, name: str, seed: int) -> Path:
    """Under ComfyUI's names."""
    return _write(folder, name, seed, {f"diffusion_model.{key}": shape for key, shape in _Z_IMAGE.items()})


def _text_encoder(encoder: str) -> dict[str, int]:
    layers = (f"text_model_encoder_layers_{number}_{matrix}" for number in (0, 1) for matrix in _LAYERS)
    return {f"{encoder}_{layer}": 32 for layer in layers}


def _write(folder: Path, name: str, seed: int, shapes: dict[str, tuple[int, int]]) -> Path:
    draws = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for key, (fan_in, out) in shapes.items():
        for role, shape in (("down", (4, fan_in)), ("up", (out, 4))):
            tensors[f"{key}.lora_{role}.weight"] = torch.randn(shape, generator=draws) * 0.2
        tensors[f"{key}.alpha"] = torch.tensor(4.0)
    path = folder / f"{name}.safetensors"
    save_file(tensors, path, {"mole.trigger": f"sks {name}", "mole.class": name})
    return path
