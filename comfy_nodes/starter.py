"""The small model that ships with the project, as ComfyUI's own MODEL, CLIP and VAE."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.utils
import numpy as np
import torch
from comfy.latent_formats import LatentFormat
from comfy.model_base import ModelType
from comfy.supported_models_base import ClipTarget

from mole_diffusion.core.errors import UnknownExpertError
from mole_diffusion.pictures.files import open_picture
from mole_diffusion.starter import starter_dir, starter_experts

#: Height and width in pixels of what the starter was trained on.
PICTURE_SIZE = 128


class _Multiple(int):
    """Width of a level as a multiple of the first, also where that is no whole number."""

    width: int
    first: int

    def __new__(cls, width: int, first: int) -> _Multiple:
        multiple = super().__new__(cls, width // first)
        multiple.width, multiple.first = width, first
        return multiple

    def __getnewargs__(self) -> tuple[int, int]:  # type: ignore[override]
        return self.width, self.first

    def __mul__(self, other: int) -> int:
        return self.width

    __rmul__ = __mul__


class StarterModel(comfy.supported_models.SD15):  # type: ignore[misc]
    """How ComfyUI builds and samples the starter: v-prediction, and a last timestep of pure noise."""

    unet_config: ClassVar[dict[str, Any]] = {}
    unet_extra_config: ClassVar[dict[str, Any]] = {}
    sampling_settings: ClassVar[dict[str, Any]] = {
        "beta_schedule": "linear",
        "linear_start": 0.00085,
        "linear_end": 0.012,
        "zsnr": True,
    }
    mole_picture_size = PICTURE_SIZE

    def model_type(self, state_dict: Any, prefix: str = "") -> Any:
        """What the network predicts."""
        return ModelType.V_PREDICTION

    def inpaint_model(self) -> bool:
        """Whether the network reads mask and picture too: ComfyUI takes over four channels for a sign."""
        return False


def load_starter() -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE of the starter.

    Raises:
        FileNotFoundError: the starter is missing from this installation.
    """
    folder = starter_dir()
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"The starter is missing: there is no model_index.json in {folder}.")
    model, clip, vae = _load_model(folder), _load_clip(folder), _load_vae(folder)
    _let_preview(model.model.latent_format, vae)
    return model, clip, vae


def starter_pictures(name: str) -> torch.Tensor:
    """The reference pictures of one of the starter's experts, as ComfyUI's IMAGE (n, H, W, 3) in 0..1.

    Raises:
        UnknownExpertError: the starter has no such expert.
    """
    experts = starter_experts()
    if name not in experts:
        raise UnknownExpertError(name, list(experts))
    pictures = [open_picture(path) for path in experts[name].references]
    return torch.stack([torch.from_numpy(np.asarray(one, dtype=np.float32) / 255) for one in pictures])


def _config(folder: Path, part: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / part / "config.json").read_text())
    return found


def _weights(folder: Path, part: str, name: str) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = comfy.utils.load_torch_file(str(folder / part / name))
    return weights


def _unet_config(config: dict[str, Any]) -> dict[str, Any]:
    """The UNet's diffusers configuration in ComfyUI's words."""
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    depths = [int(kind.startswith("CrossAttn")) for kind in config["down_block_types"]]
    heads = {width // count for width, count in zip(widths, config["attention_head_dim"], strict=True)}
    if len(heads) != 1:
        raise ValueError(
            f"the starter's UNet has attention heads of widths {heads}; ComfyUI builds one width"
        )
    return {
        "image_size": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": widths[0],
        "num_res_blocks": [layers] * len(widths),
        "channel_mult": [_Multiple(width, widths[0]) for width in widths],
        "transformer_depth": [depth for depth in depths for _ in range(layers)],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [depth for depth in depths for _ in range(layers + 1)],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": config["use_linear_projection"],
        "context_dim": config["cross_attention_dim"],
        "num_heads": -1,
        "num_head_channels": heads.pop(),
        "adm_in_channels": None,
        "use_temporal_attention": False,
        "use_temporal_resblock": False,
        "legacy": False,
        "use_checkpoint": False,
    }


def _latent_format(config: dict[str, Any]) -> Any:
    latents = LatentFormat()
    latents.latent_channels, latents.scale_factor = config["latent_channels"], config["scaling_factor"]
    return latents


def _load_model(folder: Path) -> Any:
    config = StarterModel(_unet_config(_config(folder, "unet")))
    config.latent_format = _latent_format(_config(folder, "vae"))
    load_device = comfy.model_management.get_torch_device()
    dtype = comfy.model_management.unet_dtype(supported_dtypes=config.supported_inference_dtypes)
    config.set_inference_dtype(
        dtype, comfy.model_management.unet_manual_cast(dtype, load_device, config.supported_inference_dtypes)
    )
    weights = _weights(folder, "unet", "diffusion_pytorch_model.safetensors")
    names = comfy.utils.unet_to_diffusers(config.unet_config)
    offload_device = comfy.model_management.unet_offload_device()
    model = config.get_model({}, device=offload_device)
    model.load_model_weights({names[name]: weight for name, weight in weights.items()})
    return comfy.model_patcher.ModelPatcher(model, load_device=load_device, offload_device=offload_device)


def _load_clip(folder: Path) -> Any:
    config = _config(folder, "text_encoder")
    tokens = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())["model_max_length"]
    # ComfyUI pads every text to all positions there are; the starter was trained on fewer.
    config = {**config, "max_position_embeddings": tokens}
    special = {"start": config["bos_token_id"], "end": config["eos_token_id"], "pad": config["pad_token_id"]}

    class Tokenizer(comfy.sd1_clip.SDTokenizer):  # type: ignore[misc]
        def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
            super().__init__(
                str(folder / "tokenizer"),
                max_length=tokens,
                embedding_directory=embedding_directory,
                embedding_size=config["hidden_size"],
            )

    class TextEncoder(comfy.sd1_clip.SDClipModel):  # type: ignore[misc]
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
            super().__init__(
                device=device,
                dtype=dtype,
                max_length=tokens,
                textmodel_json_config=config,
                special_tokens=special,
                return_projected_pooled=False,
                model_options=model_options or {},
            )
            # ComfyUI's embedding has CLIP's vocabulary.
            operations = (model_options or {}).get("custom_operations") or comfy.ops.manual_cast
            self.transformer.set_input_embeddings(
                operations.Embedding(config["vocab_size"], config["hidden_size"], dtype=dtype, device=device)
            )

    clip = comfy.sd.CLIP(
        ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel),
        tokenizer_data={"clip_l_tokenizer_class": Tokenizer},
        model_options={"clip_l_class": TextEncoder},
    )
    weights = _weights(folder, "text_encoder", "model.safetensors")
    weights = {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in weights.items()}
    positions = "text_model.embeddings.position_embedding.weight"
    weights[positions] = weights[positions][:tokens]
    # Stable Diffusion does not use it, and ComfyUI would leave it as the memory was.
    weights["text_projection.weight"] = torch.eye(config["hidden_size"])
    clip.load_sd(weights)
    return clip


def _load_vae(folder: Path) -> Any:
    # ComfyUI knows this kind of codec under the names of TAESD; its decoder begins with a clamp.
    named = {"taesd_encoder": 0, "taesd_decoder": 1}
    weights = {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}
    for name, weight in _weights(folder, "vae", "diffusion_pytorch_model.safetensors").items():
        part, _, place = name.partition(".layers.")
        number, _, leaf = place.partition(".")
        weights[f"taesd_{part}.{int(number) + named[f'taesd_{part}']}.{leaf}"] = weight
    return comfy.sd.VAE(weights)


def _let_preview(latents: Any, vae: Any) -> None:
    """Say how latents look: ComfyUI's previews are a linear map of them, here that of plain colours."""
    levels = torch.linspace(0, 1, 3)
    colours = torch.cartesian_prod(levels, levels, levels)
    encoded = latents.process_in(vae.encode(colours[:, None, None].expand(-1, 32, 32, -1))).float().cpu()
    places = torch.nn.functional.pad(encoded.movedim(1, -1), (0, 1), value=1.0)
    wanted = (2 * colours[:, None, None] - 1).expand(*places.shape[:-1], -1)
    # Sixteen channels hold more than colours: without a bound the map would be wild along the rest.
    mapping = torch.linalg.lstsq(places.flatten(0, 2), wanted.flatten(0, 2), rcond=1e-3, driver="gelsd")
    *latents.latent_rgb_factors, latents.latent_rgb_factors_bias = mapping.solution.tolist()
