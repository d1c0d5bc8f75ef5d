"""A pipeline's weights in one file, named and shaped as in the original Stable Diffusion 1.x or XL (LDM)."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from tiny.networks import LDMUNet

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embed.linear_1": "time_embed.0",
    "time_embed.linear_2": "time_embed.2",
}
OPENCLIP = {
    "encoder.layers.": "transformer.resblocks.",
    "self_attn.": "attn.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def write_ldm_checkpoint(path: Path, pipe: Any) -> Path:
    """UNet, autoencoder and text encoder of `pipe` under LDM's names."""
    state = _unet_and_vae(pipe)
    for name, value in pipe.text_encoder.state_dict().items():
        state["cond_stage_model.transformer.text_model." + name.removeprefix("text_model.")] = value
    save_file({k: v.detach().clone().contiguous() for k, v in state.items()}, path)
    return path


def write_sdxl_checkpoint(path: Path, pipe: Any) -> Path:
    """The same for SDXL: two text encoders, the second one under OpenCLIP's names."""
    state = _unet_and_vae(pipe)
    for name, value in pipe.text_encoder.state_dict().items():
        state["conditioner.embedders.0.transformer.text_model." + name.removeprefix("text_model.")] = value
    for name, value in _openclip(pipe.text_encoder_2.state_dict()).items():
        state["conditioner.embedders.1.model." + name] = value
    save_file({k: v.detach().clone().contiguous() for k, v in state.items()}, path)
    return path


def ldm_shapes(unet: Any, vae: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a UNet and an autoencoder in LDM's format; their weights need not exist."""
    state = _unet_and_vae(SimpleNamespace(unet=unet, vae=vae))
    return {name: tuple(value.shape) for name, value in state.items()}


def _openclip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' names to OpenCLIP's: q, k and v in one, the projection the other way round."""
    found: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        name = key.removeprefix("text_model.")
        for old, new in OPENCLIP.items():
            name = name.replace(old, new)
        if name == "text_projection.weight":
            found["text_projection"] = value.T
        elif ".q_proj." in key:
            parts = [state[key.replace(".q_proj.", f".{x}_proj.")] for x in "qkv"]
            found[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
        elif ".k_proj." not in key and ".v_proj." not in key:
            found[name] = value
    return found


def _unet_and_vae(pipe: Any) -> dict[str, torch.Tensor]:
    state = {}
    for name, value in LDMUNet(pipe.unet).state_dict().items():
        state["model.diffusion_model." + _unet_name(name)] = value
    added = getattr(pipe.unet, "add_embedding", None)
    for name, value in added.state_dict().items() if added is not None else ():
        place = {"linear_1": "0", "linear_2": "2"}
        layer, _, leaf = name.partition(".")
        state[f"model.diffusion_model.label_emb.0.{place[layer]}.{leaf}"] = value
    for name, value in pipe.vae.state_dict().items() if pipe.vae is not None else ():
        new = _vae_name(name, len(pipe.vae.decoder.up_blocks))
        convolution = ".attn_1." in new and new.endswith("weight") and value.ndim == 2
        state["first_stage_model." + new] = value[:, :, None, None] if convolution else value
    return state


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
