"""A tiny Stable Diffusion XL of the real classes, and LoRA files for its three networks."""

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

WIDTH_1, WIDTH_2, PROJECTION, TIME = 16, 24, 8, 8
TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],
    "text_encoder_2": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
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
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
        force_upcast=False,
    )
    second = copy.deepcopy(tokenizer)
    second.pad_token = "z"
    texts = {
        "text_encoder": CLIPTextModel(_text_config(tokenizer, WIDTH_1, 2)),
        "text_encoder_2": CLIPTextModelWithProjection(_text_config(second, WIDTH_2, layers)),
    }
    networks = {name: network.eval() for name, network in {"unet": unet, "vae": vae, **texts}.items()}
    rest = {"feature_extractor": None, "image_encoder": None}
    scheduler = EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1)
    return {**networks, **rest, "tokenizer": tokenizer, "tokenizer_2": second, "scheduler": scheduler}


def _text_config(tokenizer: Any, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=PROJECTION,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def write_xl_lora(path: Path, components: dict[str, Any], seed: int, rank: int) -> Path:
    """A LoRA of random factors for all three networks, made by PEFT and saved by diffusers."""
    torch.manual_seed(seed)
    layers, metadata = {}, {}
    for part, names in TARGETS.items():
        network = copy.deepcopy(components[part])
        network.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names), "new")
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(network, adapter_name="new")
        metadata[f"{part}_lora_adapter_metadata"] = network.peft_config["new"].to_dict()
    StableDiffusionXLPipeline.save_lora_weights(path.parent, weight_name=path.name, **layers, **metadata)
    return path
