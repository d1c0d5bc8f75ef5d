"""A pipeline's weights in one file, named and shaped as in the original Stable Diffusion 1.x (LDM)."""

import re
from pathlib import Path
from typing import Any

import torch
from core.core_tools import LDMUNet
from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {"time_embed.linear_1": "time_embed.0", "time_embed.linear_2": "time_embed.2"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def write_ldm_checkpoint(path: Path, pipe: Any) -> Path:
    """UNet, autoencoder and text encoder of `pipe` under LDM's names."""
    state = {}
    for name, value in LDMUNet(pipe.unet).state_dict().items():
        state["model.diffusion_model." + _unet_name(name)] = value
    for name, value in pipe.vae.state_dict().items():
        new = _vae_name(name, len(pipe.vae.decoder.up_blocks))
        convolution = ".attn_1." in new and new.endswith("weight") and value.ndim == 2
        state["first_stage_model." + new] = value[:, :, None, None] if convolution else value
    for name, value in pipe.text_encoder.state_dict().items():
        state["cond_stage_model.transformer.text_model." + name.removeprefix("text_model.")] = value
    save_file({k: v.detach().clone().contiguous() for k, v in state.items()}, path)
    return path


def _unet_name(name: str) -> str:
    name = re.sub(r"^(input_blocks\.\d+\.0)\.conv\.", r"\1.op.", name)  # Downsample
    for old, new in {**RESNET, **UNET}.items():
        if "transformer_blocks" not in name:
            name = name.replace(f"{old}.", f"{new}.")
    return name


def _vae_name(name: str, levels: int) -> str:
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    # LDM counts the decoder's levels from the picture.
    name = re.sub(
        r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", name
    )
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if "mid_block.attentions.0" in name:
        for old, new in VAE_ATTENTION.items():
            name = name.replace(f"attentions.0.{old}.", f"attentions.0.{new}.")
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    return name


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two networks hold the same tensors under the same names."""
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
