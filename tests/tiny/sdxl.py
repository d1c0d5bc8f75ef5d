"""A tiny Stable Diffusion XL of the real classes, and LoRA files for its three networks."""

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from .sd import TEXT_TARGETS, UNET_TARGETS, make_vae, random_lora, text_config

WIDTH_1, WIDTH_2, PROJECTION, TIME = 16, 24, 8, 8
TARGETS = {
    "unet": UNET_TARGETS,
    "text_encoder": TEXT_TARGETS,
    "text_encoder_2": [*TEXT_TARGETS, "fc1", "fc2"],
}


def make_xl_components(tokenizer: Any, *, channels: int = 4, layers: int = 2) -> dict[str, Any]:
    """Networks with random weights, the same for the same arguments.

    Args:
        tokenizer: of the first text encoder; the second one's pads with another token, as SDXL's does.
        channels: input channels of the UNet; an inpainting one has 9.
        layers: of the second text encoder.
    """
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=channels,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=WIDTH_1 + WIDTH_2,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME,
        projection_class_embeddings_input_dim=PROJECTION + 6 * TIME,
    )
    vae = make_vae(force_upcast=False)
    second = copy.deepcopy(tokenizer)
    second.pad_token = "z"
    texts = {
        "text_encoder": CLIPTextModel(text_config(tokenizer, WIDTH_1, 2, projection_dim=PROJECTION)),
        "text_encoder_2": CLIPTextModelWithProjection(
            text_config(second, WIDTH_2, layers, projection_dim=PROJECTION)
        ),
    }
    networks = {name: network.eval() for name, network in {"unet": unet, "vae": vae, **texts}.items()}
    rest = {"feature_extractor": None, "image_encoder": None}
    scheduler = EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1)
    return {**networks, **rest, "tokenizer": tokenizer, "tokenizer_2": second, "scheduler": scheduler}


def make_refiner_components(tokenizer: Any) -> dict[str, Any]:
    """The same of SDXL's refiner: the second text encoder alone, and a score of beauty for a size."""
    parts = make_xl_components(tokenizer)
    torch.manual_seed(1)
    settings = {
        "cross_attention_dim": WIDTH_2,
        "projection_class_embeddings_input_dim": PROJECTION + 5 * TIME,
    }
    unet = UNet2DConditionModel.from_config({**parts["unet"].config, **settings})
    told = {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
    return {**parts, "unet": unet.eval(), "text_encoder": None, "tokenizer": None, **told}


def write_xl_lora(path: Path, components: dict[str, Any], seed: int, rank: int) -> Path:
    """A LoRA of random factors for all three networks, saved by diffusers."""
    torch.manual_seed(seed)
    layers, metadata = {}, {}
    for part, names in TARGETS.items():
        if components[part] is None:
            continue
        layers[f"{part}_lora_layers"], settings = random_lora(components[part], names, rank)
        metadata[f"{part}_lora_adapter_metadata"] = settings
    StableDiffusionXLPipeline.save_lora_weights(path.parent, weight_name=path.name, **layers, **metadata)
    return path
