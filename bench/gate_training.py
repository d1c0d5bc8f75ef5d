"""The training of gates on a Stable Diffusion 1.5 of random weights, in time and memory."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from PIL import Image, ImageDraw
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from bench.measuring import peak_of
from bench.networks import RANK, SD15, TARGETS, TINY, Shape, make_unet
from mole_diffusion import StableDiffusionMoLEPipeline
from mole_diffusion.core.experts import Expert
from mole_diffusion.pictures.training import Concept, TrainingConfig

#: The starter's tokenizer knows these words.
TOKENIZER = Path(__file__).resolve().parent.parent / "assets" / "starter" / "tokenizer"
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
NAMES = ("boot", "cat", "clock")
COLOURS = ((220, 30, 40), (250, 200, 40), (40, 160, 60))
REFERENCES = 4

FULL_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
TINY_VAE: dict[str, Any] = {
    **FULL_VAE,
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
FULL_TEXT = {"intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
TINY_TEXT = {"intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def make_pipeline(shape: Shape, device: torch.device, *, tiny: bool) -> StableDiffusionMoLEPipeline:
    """A Stable Diffusion of random weights with three experts and fresh token gates."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer) if tiny else 49408,
        hidden_size=shape.text_width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **(TINY_TEXT if tiny else FULL_TEXT),
    )
    torch.manual_seed(0)
    with torch.device(device):
        vae = AutoencoderKL(latent_channels=4, sample_size=8 * shape.side, **(TINY_VAE if tiny else FULL_VAE))
        text_encoder = CLIPTextModel(text)
    pipe = StableDiffusionMoLEPipeline(
        unet=make_unet(shape, device),
        vae=vae.to(shape.dtype).eval(),
        text_encoder=text_encoder.to(shape.dtype).eval(),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    networks = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    for seed, name in enumerate(NAMES):
        pipe.add_expert(random_expert(networks, name, seed))
    return pipe


def random_expert(networks: Mapping[str, nn.Module], name: str, seed: int) -> Expert:
    """An expert of random factors for all attention and feed-forward matrices."""
    generator = torch.Generator().manual_seed(seed)

    def random(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        values = torch.randn(rows, columns, generator=generator)
        return values.mul_(float(columns) ** -0.5).to(dtype)

    state = {}
    for part, network in networks.items():
        for path, module in network.named_modules():
            if isinstance(module, nn.Linear) and path.endswith((*TARGETS, *TEXT_TARGETS)):
                out, fan_in = module.weight.shape
                state[f"{part}.{path}.lora_A.weight"] = random(RANK, fan_in, module.weight.dtype)
                state[f"{part}.{path}.lora_B.weight"] = 0.1 * random(out, RANK, module.weight.dtype)
    return Expert.from_state_dict(state, name=name)


def make_concepts(pixels: int) -> list[Concept]:
    """Three shapes of three colours, each in a few places."""
    concepts = []
    for name, colour in zip(NAMES, COLOURS, strict=True):
        pictures = []
        for number in range(REFERENCES):
            grey = np.random.default_rng(number).integers(120, 180, (pixels, pixels, 3), dtype=np.uint8)
            picture = Image.fromarray(grey)
            left = pixels // 4 + number * pixels // 16
            ImageDraw.Draw(picture).ellipse((left, left, left + pixels // 3, left + pixels // 3), colour)
            pictures.append(picture)
        concepts.append(Concept(name, f"a red {name}", f"a {name}", pictures))
    return concepts


def train_gates(
    device: torch.device, *, tiny: bool, checkpointing: bool, iterations: int, until: float = float("inf")
) -> dict[str, Any]:
    """Train gates with the default settings but for given pictures; what it took.

    Args:
        until: seconds from now after which the training stops, once there are two iterations.
    Returns:
        "seconds" of the whole call, pictures' preparation included; "seconds_an_iteration" (median);
        "peak": bytes beside the weights (None without a CUDA device); what was trained.
    """
    end = time.monotonic() + until
    shape = TINY if tiny else SD15
    pipe = make_pipeline(shape, device, tiny=tiny)
    pixels = 8 * shape.side
    settings: dict[str, Any] = {"collage_batch": 2, "pool_size": 4} if tiny else {}
    config = TrainingConfig(
        iterations=2 if tiny else iterations,
        collage_background="sources",
        gradient_checkpointing=checkpointing,
        progress=False,
        **settings,
    )
    clock: list[float] = []
    concepts = make_concepts(pixels)
    prompt = ", ".join(concept.text for concept in concepts)

    def work() -> None:
        result = pipe.train_gates(
            prompt,
            concepts,
            config,
            callback=lambda event: event.iteration < 2 or time.monotonic() < end,
        )
        clock.extend(row["seconds"] for row in result.history)

    peak = peak_of(work, device)
    return {
        "pixels": pixels,
        "experts": len(NAMES),
        "batch": config.collage_batch,
        "checkpointing": checkpointing,
        "iterations": len(clock),
        "seconds": clock[-1],
        "seconds_an_iteration": statistics.median(
            later - earlier for earlier, later in itertools.pairwise(clock)
        ),
        "peak": peak,
    }
