"""Tiny and full-size Stable Diffusions, LoRAs for every matrix of their module lists, and the dialects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from .copying import clone_all

TEXT_1, TEXT_2, TOKENS = 16, 24, 12
CROSS, DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
TEXT_LEAVES = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
ATTENTION_LEAVES = ("to_q", "to_k", "to_v", "to_out.0")

Parts = dict[str, nn.Module]


def make_unet(family: str, *, layers: int = 2, full: bool = False) -> UNet2DConditionModel:
    """A UNet of the shape of "sd15", "sd21" or "sdxl"; tiny (two levels) unless `full`."""
    xl = family == "sdxl"
    down = (DOWN, CROSS, CROSS) if xl else (CROSS, CROSS, CROSS, DOWN)
    settings: dict[str, Any] = {
        "block_out_channels": (320, 640, 1280) if xl else (320, 640, 1280, 1280),
        "cross_attention_dim": {"sd15": 768, "sd21": 1024, "sdxl": 2048}[family],
        "transformer_layers_per_block": (1, 2, 10) if xl else 1,
        "projection_class_embeddings_input_dim": 2816 if xl else None,
        "addition_time_embed_dim": 256 if xl else None,
    }
    if not full:
        down = (DOWN, CROSS) if xl else (CROSS, DOWN)
        settings = {
            "block_out_channels": (16, 32),
            "cross_attention_dim": TEXT_1 + TEXT_2 if xl else TEXT_1,
            "transformer_layers_per_block": (1, 2) if xl else 1,
            "projection_class_embeddings_input_dim": 8 + 6 * 8 if xl else None,
            "addition_time_embed_dim": 8 if xl else None,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
            "sample_size": 8,
        }
    torch.manual_seed(1)
    return UNet2DConditionModel(
        layers_per_block=layers,
        down_block_types=down,
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        use_linear_projection=family != "sd15",
        addition_embed_type="text_time" if xl else None,
        **settings,
    ).eval()


def make_text(second: bool, *, width: int = 0, layers: int = 2) -> nn.Module:
    torch.manual_seed(2 + second)
    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=width or (TEXT_2 if second else TEXT_1),
        intermediate_size=4 * (width or 8),
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=width or 8,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return (CLIPTextModelWithProjection(config) if second else CLIPTextModel(config)).eval()


def make_parts(family: str, *, layers: int = 2) -> Parts:
    parts: Parts = {"unet": make_unet(family, layers=layers), "text_encoder": make_text(False)}
    return {**parts, "text_encoder_2": make_text(True)} if family == "sdxl" else parts


def matrices(network: nn.Module) -> dict[str, nn.Module]:
    """Canonical name -> Linear or Conv2d, of the real module list."""
    return {
        name.removeprefix("text_model."): module
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }


@dataclass(frozen=True)
class Pair:
    """LoRA factors of one matrix in the shape of its module; alpha None where the file has none."""

    down: Tensor
    up: Tensor
    alpha: float | None


Factors = dict[tuple[str, str], Pair]


def make_factors(
    parts: Parts, wanted: Callable[[str, str], bool] = lambda part, name: True, *, alphas: str = "differ"
) -> Factors:
    """Random factors whose ranks differ from matrix to matrix.

    Args:
        alphas: "differ" from matrix to matrix, "same" for all, or "none".
    """
    generator = torch.Generator().manual_seed(5)
    factors: Factors = {}
    for part, network in parts.items():
        for index, (name, module) in enumerate(matrices(network).items()):
            if not wanted(part, name):
                continue
            rank = 1 + index % 3
            out, fan_in, *kernel = module.weight.shape
            down = torch.randn(rank, fan_in, *kernel, generator=generator) * 0.1
            up = torch.randn(out, rank, *[1 for _ in kernel], generator=generator) * 0.2
            alpha = {"differ": 0.5 + index % 2 * rank, "same": 1.5, "none": None}[alphas]
            factors[part, name] = Pair(down, up, alpha)
    return factors


def write(factors: Factors, module_of: Callable[[str, str], str], down: str, up: str) -> dict[str, Tensor]:
    """A file: `module_of(part, matrix)` with the suffixes of the factors, and alphas."""
    state = {}
    for (part, name), pair in factors.items():
        module = module_of(part, name)
        state[f"{module}{down}"], state[f"{module}{up}"] = pair.down.clone(), pair.up.clone()
        if pair.alpha is not None:
            state[f"{module}.alpha"] = torch.tensor(pair.alpha)
    return state


def ldm_names(unet: UNet2DConditionModel) -> dict[str, str]:
    """Canonical name -> LDM name of every matrix, by walking the blocks in LDM's order."""
    prefixes: dict[str, str] = {}
    number = 1
    for level, block in enumerate(unet.down_blocks):
        for position in range(len(block.resnets)):
            prefixes[f"down_blocks.{level}.resnets.{position}."] = f"input_blocks.{number}.0."
            prefixes[f"down_blocks.{level}.attentions.{position}."] = f"input_blocks.{number}.1."
            number += 1
        if block.downsamplers:
            prefixes[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for level, block in enumerate(unet.up_blocks):
        for position in range(len(block.resnets)):
            prefixes[f"up_blocks.{level}.resnets.{position}."] = f"output_blocks.{number}.0."
            prefixes[f"up_blocks.{level}.attentions.{position}."] = f"output_blocks.{number}.1."
            number += 1
        child = 2 if getattr(block, "attentions", None) else 1
        prefixes[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{child}.conv"
    prefixes |= {
        "mid_block.resnets.0.": "middle_block.0.",
        "mid_block.attentions.0.": "middle_block.1.",
        "mid_block.resnets.1.": "middle_block.2.",
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }
    leaves = {
        "conv1": "in_layers.2",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    names = {}
    for name in matrices(unet):
        prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
        rest = name.removeprefix(prefix)
        names[name] = prefixes[prefix] + leaves.get(rest, rest)
    return names


def flat(prefixes: Mapping[str, str], rename: Mapping[str, str] | None = None) -> Callable[[str, str], str]:
    """Names with underscores: `prefixes` by part, the UNet's names replaced by `rename`."""

    def module_of(part: str, name: str) -> str:
        if part == "unet":
            name = (rename or {}).get(name, name)
        elif name != "text_projection":
            name = f"text_model.{name}"
        return f"{prefixes[part]}{name.replace('.', '_')}"

    return module_of


def dotted(prefixes: Mapping[str, str], rename: Mapping[str, str] | None = None) -> Callable[[str, str], str]:
    """The same with dots."""

    def module_of(part: str, name: str) -> str:
        name = (rename or {}).get(name, name) if part == "unet" else f"text_model.{name}"
        return f"{prefixes[part]}{name}"

    return module_of


KOHYA_1 = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
KOHYA_XL = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
DIFFUSERS = {part: f"{part}." for part in ("unet", "text_encoder", "text_encoder_2")}


def run_part(part: str, network: nn.Module) -> Tensor:
    """The last hidden states of a text encoder and its pooled text, or a UNet's prediction; fixed inputs."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        if part != "unet":
            output = network(torch.randint(3, 64, (2, TOKENS), generator=generator))
            pooled = output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output
            return torch.cat([output.last_hidden_state.flatten(1), pooled], dim=1)
        latent = torch.randn(2, 4, 8, 8, generator=generator)
        width = network.config.cross_attention_dim
        text = torch.randn(2, TOKENS, width, generator=generator)
        added = {
            "text_embeds": torch.randn(2, 8, generator=generator),
            "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2),
        }
        extra = {"added_cond_kwargs": added} if network.config.addition_embed_type else {}
        return network(latent, torch.tensor(500), text, **extra).sample


def with_diffusers(parts: Parts, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The oracle: what copies of the networks say after diffusers' `load_lora_weights`."""
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    shared = {"vae": None, "tokenizer": None, "scheduler": scheduler, "feature_extractor": None}
    networks = clone_all(parts)
    if "text_encoder_2" in parts:
        pipe = StableDiffusionXLPipeline(**networks, **shared, tokenizer_2=None, add_watermarker=False)
    else:
        pipe = StableDiffusionPipeline(
            **networks, **shared, safety_checker=None, requires_safety_checker=False
        )
    # In float32, for PEFT computes in the data type of the file where it is a half.
    pipe.load_lora_weights({key: value.float().clone() for key, value in state.items()}, adapter_name="dog")
    return {part: run_part(part, getattr(pipe, part).eval()) for part in parts}
