"""Tiny pipelines around denoising transformers, of the real classes, and LoRA files for them."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5TokenizerFast

from .sd import TEXT_TARGETS, WORDS, make_tokenizer, make_vae, random_lora, text_config

TEXT = 32
BLOCKS: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT,
    "axes_dims_rope": (4, 4, 8),
}
FLUX_TARGETS = [
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj"),
    *("attn.add_v_proj", "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj"),
    *("ff_context.net.2", "proj_mlp", "proj_out"),
]


def filled(network: nn.Module) -> nn.Module:
    """The network with noise on its weights, some of which diffusers starts at zero."""
    with torch.no_grad():
        for value in network.parameters():
            value.add_(torch.randn_like(value) * 0.05)
    return network.eval()


def t5_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer of a few words and the alphabet."""
    pieces = ["<pad>", "</s>", "<unk>", *(f"▁{word}" for word in WORDS), *"▁abcdefghijklmnopqrstuvwxyz"]
    return T5TokenizerFast(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)


def t5_encoder(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    config = T5Config(vocab_size=len(tokenizer), d_model=TEXT, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return filled(T5EncoderModel(config))


def flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """As FLUX.1 dev's: shifted by the size of the picture."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def make_flux_components(folder: Path, *, guidance: bool = True) -> dict[str, Any]:
    """A FLUX.1; `guidance`: distilled as dev, else as schnell."""
    torch.manual_seed(0)
    clip_tokenizer, tokenizer = make_tokenizer(folder), t5_tokenizer()
    transformer = FluxTransformer2DModel(**BLOCKS, pooled_projection_dim=24, guidance_embeds=guidance)
    return {
        "transformer": filled(transformer),
        "vae": make_vae(shift_factor=0.1).eval(),
        "text_encoder": filled(CLIPTextModel(text_config(clip_tokenizer, 24, 2))),
        "text_encoder_2": t5_encoder(tokenizer),
        "tokenizer": clip_tokenizer,
        "tokenizer_2": tokenizer,
        "scheduler": flow_scheduler(),
    }


def make_chroma_components() -> dict[str, Any]:
    torch.manual_seed(0)
    tokenizer = t5_tokenizer()
    transformer = ChromaTransformer2DModel(
        **BLOCKS, approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1
    )
    return {
        "transformer": filled(transformer),
        "vae": make_vae(shift_factor=0.1).eval(),
        "text_encoder": t5_encoder(tokenizer),
        "tokenizer": tokenizer,
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }


def make_sd3_components(folder: Path) -> dict[str, Any]:
    """A Stable Diffusion 3.5 medium."""
    torch.manual_seed(0)
    words, tokenizer = make_tokenizer(folder), t5_tokenizer()
    clips = [filled(CLIPTextModelWithProjection(text_config(words, 12, 2, projection_dim=12))) for _ in "12"]
    transformer = SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        caption_projection_dim=32,
        pooled_projection_dim=24,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return {
        "transformer": filled(transformer),
        "vae": make_vae(shift_factor=0.1, latent_channels=16).eval(),
        "text_encoder": clips[0],
        "text_encoder_2": clips[1],
        "text_encoder_3": t5_encoder(tokenizer),
        "tokenizer": words,
        "tokenizer_2": words,
        "tokenizer_3": tokenizer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def write_transformer_lora(
    path: Path, components: dict[str, Any], seed: int, rank: int, targets: list[str], *, text: bool = False
) -> Path:
    """A LoRA of random factors, saved by diffusers; `text`: for CLIP too."""
    torch.manual_seed(seed)
    layers, metadata = {}, {}
    parts = {"transformer": targets, **({"text_encoder": TEXT_TARGETS} if text else {})}
    for part, names in parts.items():
        layers[f"{part}_lora_layers"], settings = random_lora(components[part], names, rank)
        metadata[f"{part}_lora_adapter_metadata"] = settings
    writer: Any = FluxPipeline if text else ChromaPipeline
    writer.save_lora_weights(path.parent, weight_name=path.name, **layers, **metadata)
    return path
