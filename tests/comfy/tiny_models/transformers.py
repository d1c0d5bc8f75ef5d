"""Tiny transformers with text encoders of ComfyUI's own classes and real tokenizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import comfy.ldm.flux.model
import comfy.ldm.lumina.model
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.text_encoders.flux
import comfy.text_encoders.llama
import comfy.text_encoders.t5
import comfy.text_encoders.z_image
import torch
from comfy.supported_models_base import ClipTarget

from .weights import codec, fill
from .xl import _TEXT

TEXT = 32
CHANNELS = 16
#: Side of the pictures in pixels.
SIZE = 64


def asks(name: str, kind: Any) -> bool:
    """Whether settings of a kind have a name in this core."""
    return name in kind.__dataclass_fields__


def placed(
    settings: dict[str, Any], *axes: int, kind: Any = comfy.ldm.flux.model.FluxParams
) -> dict[str, Any]:
    """Settings of FLUX's kin, with the axes in which text tokens have places where a core asks for these."""
    return {**settings, "txt_ids_dims": list(axes)} if asks("txt_ids_dims", kind) else settings


FLUX: dict[str, Any] = {
    "image_model": "flux",
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "hidden_size": 32,
    "context_in_dim": TEXT,
    "vec_in_dim": TEXT,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [4, 4, 8],
    "mlp_ratio": 4.0,
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
}
Z_IMAGE: dict[str, Any] = {
    "image_model": "lumina2",
    "in_channels": CHANNELS,
    # Modulations have 256 inputs, as the real ones.
    "dim": 288,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 6,
    "n_kv_heads": 6,
    "cap_feat_dim": TEXT,
    "axes_dims": [16, 16, 16],
    "axes_lens": [256, 64, 64],
    "norm_eps": 1e-5,
    "qk_norm": True,
    "patch_size": 2,
    "multiple_of": 256,
    "ffn_dim_multiplier": 8 / 3,
    "rope_theta": 256.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
_T5: dict[str, Any] = {
    "d_ff": 2 * TEXT,
    "d_kv": 16,
    "d_model": TEXT,
    "dense_act_fn": "gelu_pytorch_tanh",
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-6,
    "model_type": "t5",
    "num_heads": 2,
    "num_layers": 2,
    "relative_attention_num_buckets": 32,
    "vocab_size": 32128,
}
_QWEN: dict[str, Any] = {
    "hidden_size": TEXT,
    "intermediate_size": 2 * TEXT,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


class TinyFlux(comfy.supported_models.Flux):  # type: ignore[misc]
    """How ComfyUI builds it."""

    unet_config: ClassVar[dict[str, Any]] = {}
    unet_extra_config: ClassVar[dict[str, Any]] = {}
    mole_picture_size = SIZE


class TinyZImage(comfy.supported_models.ZImage):  # type: ignore[misc]
    """How ComfyUI builds it."""

    unet_config: ClassVar[dict[str, Any]] = {}
    unet_extra_config: ClassVar[dict[str, Any]] = {}
    mole_picture_size = SIZE


class TinyFluxTexts(comfy.text_encoders.flux.FluxClipModel):  # type: ignore[misc]
    """CLIP and T5."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
        torch.nn.Module.__init__(self)
        common = {"device": device, "dtype": dtype}
        self.clip_l = comfy.sd1_clip.SDClipModel(
            **common, textmodel_json_config=_TEXT, return_projected_pooled=False
        )
        self.t5xxl = comfy.sd1_clip.SDClipModel(
            **common,
            layer="last",
            textmodel_json_config=_T5,
            special_tokens={"end": 1, "pad": 0},
            model_class=comfy.text_encoders.t5.T5,
        )
        self.dtypes = {dtype}


class _TinyQwen3(comfy.sd1_clip.SDClipModel):  # type: ignore[misc]
    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
        super().__init__(
            device=device,
            dtype=dtype,
            layer="hidden",
            layer_idx=-2,
            textmodel_json_config=_QWEN,
            special_tokens={"pad": 151643},
            layer_norm_hidden_state=False,
            model_class=comfy.text_encoders.llama.Qwen3_4B,
            enable_attention_masks=True,
            return_attention_masks=True,
        )


class TinyZImageTexts(comfy.sd1_clip.SD1ClipModel):  # type: ignore[misc]
    """A language model."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
        super().__init__(device=device, dtype=dtype, name="qwen3_4b", clip_model=_TinyQwen3)


def _as_wide(network: Any) -> None:
    """The time as wide inside as Z-Image's; as many layers of the head as are run."""
    embedder = type(network.t_embedder)
    network.t_embedder = embedder(1024, output_size=256, operations=comfy.ops.disable_weight_init)


def load(family: str) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE.

    Args:
        family: "flux" or "z_image".
    """
    kind, settings, tokenizer, texts, change = FAMILIES[family]
    clip = comfy.sd.CLIP(ClipTarget(tokenizer, texts))
    fill(clip.cond_stage_model, 1)
    return model_of(kind, settings, change), clip, codec(CHANNELS)


def model_of(kind: Any, settings: dict[str, Any], change: Callable[[Any], None] = lambda _: None) -> Any:
    """A MODEL."""
    config = kind(placed(settings) if kind is TinyFlux else dict(settings))
    config.set_inference_dtype(torch.float32, None)
    device = comfy.model_management.get_torch_device()
    model = config.get_model({}, device="cpu")
    change(model.diffusion_model)
    fill(model.diffusion_model, 0)
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


FAMILIES: dict[str, tuple[Any, dict[str, Any], Any, Any, Callable[[Any], None]]] = {
    "flux": (TinyFlux, FLUX, comfy.text_encoders.flux.FluxTokenizer, TinyFluxTexts, lambda _: None),
    "z_image": (
        TinyZImage,
        Z_IMAGE,
        comfy.text_encoders.z_image.ZImageTokenizer,
        TinyZImageTexts,
        _as_wide,
    ),
}


class TinyTransformerLoader:
    """The node."""

    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "load"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"family": (list(FAMILIES),)}}

    def load(self, family: str) -> tuple[Any, Any, Any]:
        return load(family)
