"""LoRA files for the tiny SDXL of `tiny_xl`, under kohya's names."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

_BLOCKS = ("down_blocks_1_attentions_0_transformer_blocks_0", "mid_block_attentions_0_transformer_blocks_0")
_LAYERS = ("self_attn_q_proj", "self_attn_v_proj")


def write_xl_lora(folder: Path, name: str, seed: int) -> Path:
    """Random factors for the UNet and both text encoders; the file says its trigger words."""
    draws = torch.Generator().manual_seed(seed)
    shapes = {f"unet_{block}_{matrix}": 64 for block in _BLOCKS for matrix in ("attn1_to_q", "attn2_to_k")}
    for encoder in ("te1", "te2"):
        layers = (f"text_model_encoder_layers_{number}_{matrix}" for number in (0, 1) for matrix in _LAYERS)
        shapes |= {f"{encoder}_{layer}": 32 for layer in layers}
    tensors = {}
    for key, width in shapes.items():
        for role, shape in (("down", (4, width)), ("up", (width, 4))):
            tensors[f"lora_{key}.lora_{role}.weight"] = torch.randn(shape, generator=draws) * 0.2
        tensors[f"lora_{key}.alpha"] = torch.tensor(4.0)
    path = folder / f"{name}.safetensors"
    save_file(tensors, path, {"mole.trigger": f"sks {name}", "mole.class": name})
    return path
