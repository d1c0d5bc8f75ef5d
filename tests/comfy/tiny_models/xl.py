"""A tiny SDXL of ComfyUI's own classes with random weights."""

from __future__ import annotations

from typing import Any, ClassVar

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import torch
from comfy.supported_models_base import ClipTarget

from .weights import codec, fill

WIDTH = 32
_UNET = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [0, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [0, 0, 1, 1],
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "context_dim": 2 * WIDTH,
    "num_heads": -1,
    "num_head_channels": 16,
    "num_classes": "sequential",
    # Pooled text, and six numbers of the picture's size.
    "adm_in_channels": WIDTH + 6 * 256,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
    "legacy": False,
    "use_checkpoint": False,
}
_TEXT = {
    "architectures": ["CLIPTextModel"],
    "hidden_act": "gelu",
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "max_position_embeddings": 77,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "eos_token_id": 49407,
}


class TinyXL(comfy.supported_models.SDXL):  # type: ignore[misc]
    """How ComfyUI builds it."""

    unet_config: ClassVar[dict[str, Any]] = {}
    unet_extra_config: ClassVar[dict[str, Any]] = {}
    mole_picture_size = 64


class TinyTexts(comfy.sdxl_clip.SDXLClipModel):  # type: ignore[misc]
    """Both text encoders."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
        torch.nn.Module.__init__(self)
        common = {"device": device, "dtype": dtype, "layer": "hidden", "layer_idx": -2}
        common |= {"textmodel_json_config": _TEXT, "layer_norm_hidden_state": False}
        self.clip_l = comfy.sd1_clip.SDClipModel(**common)
        special = {"start": 49406, "end": 49407, "pad": 0}
        self.clip_g = comfy.sd1_clip.SDClipModel(
            **common, special_tokens=special, return_projected_pooled=True
        )
        self.dtypes = {dtype}


def load() -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE."""
    config = TinyXL(dict(_UNET))
    config.set_inference_dtype(torch.float32, None)
    device = comfy.model_management.get_torch_device()
    model = config.get_model({}, device="cpu")
    clip = comfy.sd.CLIP(ClipTarget(comfy.sdxl_clip.SDXLTokenizer, TinyTexts))
    for number, network in enumerate((model.diffusion_model, clip.cond_stage_model)):
        fill(network, number)
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))
    return patcher, clip, codec(_UNET["in_channels"])


class TinyXLLoader:
    """The node."""

    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "load"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def load(self) -> tuple[Any, Any, Any]:
        return load()
