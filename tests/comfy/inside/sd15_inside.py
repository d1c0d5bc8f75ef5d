"""A checkpoint of Stable Diffusion 1.5's shape: the same numbers as diffusers, then files for the example.

Runs by itself, because it makes the files that a test of the running ComfyUI needs.
"""

import os
from pathlib import Path
from typing import Any

import comfy.cldm.cldm
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.utils
import torch
from comfy.supported_models_base import ClipTarget
from conftest import part
from safetensors.torch import load_file, save_file

from mole_diffusion.core.experts import load_expert

FOLDER = Path(os.environ.get("MOLE_COMFY_SD15", "."))
#: ComfyUI loads checkpoints stored so, and these need a quarter of the space.
EIGHT_BITS = torch.float8_e4m3fn


def load_unet() -> Any:
    file = FOLDER / "unet.safetensors"
    weights = comfy.utils.load_torch_file(str(file))
    file.unlink()  # the checkpoint to be written holds the same
    return comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": torch.float32})


def fill(network: torch.nn.Module) -> torch.nn.Module:
    """ComfyUI leaves weights as the memory was."""
    draws = torch.Generator().manual_seed(0)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            scale = value.numel() ** -0.5 if value.dim() > 1 else 0.0
            random = torch.randn(value.shape, generator=draws) * min(scale, 0.05)
            one = value.dim() == 1 and name.endswith("weight")
            value.copy_(random + 1.0 if one else random)
    return network


def test_three_experts_with_gates_are_those_of_diffusers_and_files_are_written(starter: Any) -> None:
    model = load_unet()
    answers = load_file(FOLDER / "answers.safetensors")
    experts = part("experts").ExpertSet()
    for name in ("dog", "cat", "style"):
        experts = experts.with_expert(load_expert(FOLDER / f"{name}.safetensors"))
    gates = part("experts").GatesFile(FOLDER / "gates.safetensors")
    mixed, _ = part("apply").apply_experts(model, starter[1], experts, gates)

    def run(patcher: Any) -> torch.Tensor:
        comfy.model_management.load_models_gpu([patcher])
        network = patcher.model.diffusion_model
        return network(answers["latents"], answers["timesteps"], context=answers["text"])

    noise = run(mixed)
    assert (noise - answers["noise"]).abs().max() < 1e-4
    assert (noise - answers["base_noise"]).abs().max() > 1e-2
    assert (run(model) - answers["base_noise"]).abs().max() < 1e-4
    write_files(model)


def write_files(model: Any) -> None:
    """`sd15.safetensors` and `control.safetensors`, as people have them."""
    clip = comfy.sd.CLIP(ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel))
    fill(clip.cond_stage_model)
    details = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128}
    details |= {"ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
    vae = comfy.sd.VAE({}, config={"params": {"ddconfig": details, "embed_dim": 4}})
    fill(vae.first_stage_model)
    parts = {
        "model.diffusion_model": model.model.diffusion_model,
        "cond_stage_model": clip.cond_stage_model.clip_l,
        "first_stage_model": vae.first_stage_model,
    }
    left_out = ("logit_scale", "transformer.text_projection.weight")
    weights = {
        f"{prefix}.{name}": value.to(EIGHT_BITS).contiguous()
        for prefix, network in parts.items()
        for name, value in network.state_dict().items()
        if name not in left_out
    }
    save_file(weights, FOLDER / "sd15.safetensors")
    config = {k: v for k, v in model.model.model_config.unet_config.items() if k != "out_channels"}
    control = comfy.cldm.cldm.ControlNet(
        **{**config, "dtype": torch.float16}, hint_channels=3, operations=comfy.ops.disable_weight_init
    )
    fill(control)
    tensors = {
        f"control_model.{name}": value.to(EIGHT_BITS).contiguous()
        for name, value in control.state_dict().items()
    }
    save_file(tensors, FOLDER / "control.safetensors")
