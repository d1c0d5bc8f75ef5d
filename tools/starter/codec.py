"""The starter's picture codec: an f8 AutoencoderTiny with sixteen latent channels, for drawn scenes."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor

from . import loop, world
from .workshop import Workshop

SEED = 11
STEPS, BATCH, RATE = 2941, 64, 1.5e-3
CHANNELS = 16
NOISE = 0.2
"""Largest deviation of the noise the decoder learns to overlook, beside latents of deviation one or so."""


def new_codec(channels: int = CHANNELS) -> AutoencoderTiny:
    """TAESD's layout, which diffusers and ComfyUI both load; it has no group norms, which cost colour."""
    return AutoencoderTiny(latent_channels=channels)


def reconstruction_loss(made: Tensor, wanted: Tensor, foreground: Tensor) -> Tensor:
    """Absolute error and error of neighbour differences; objects count three times as much as background."""
    weight = (1 + 2 * foreground) / (1 + 2 * foreground).mean()
    pixel = (weight * (made - wanted).abs()).mean()
    edges = sum(
        (torch.diff(weight * made, dim=d) - torch.diff(weight * wanted, dim=d)).abs().mean() for d in (2, 3)
    )
    coarse = F.l1_loss(F.avg_pool2d(made, 4), F.avg_pool2d(wanted, 4))
    total: Tensor = pixel + edges + 0.5 * coarse
    return total


def scenes(shop: Workshop, seed: int) -> Callable[[int], loop.Batch]:
    """Batches of everything the codec must carry: all drawings, half of them recoloured, all styles."""

    count = shop.amount(BATCH)

    def make(step: int) -> loop.Batch:
        dice = shop.dice(seed, step)
        placed = shop.director.mixed(dice, count, recoloured=0.5, styled=0.25)
        pictures, cover = shop.stage.draw(placed, dice.below(1000, count))
        side = world.SIZE // 8
        return {
            "picture": (pictures * 2 - 1).contiguous(memory_format=torch.channels_last),
            "cover": cover,
            "noise": dice.normal(count, CHANNELS, side, side) * dice.uniform(count, 1, 1, 1) * NOISE,
        }

    return make


def train_codec(shop: Workshop) -> None:
    """Train on whole pictures; `scaling_factor` is 1 / the latents' deviation."""
    torch.manual_seed(SEED)
    codec = new_codec().to(shop.device, memory_format=torch.channels_last).train()

    def loss_of(batch: loop.Batch) -> Tensor:
        with shop.mixed_precision():
            latents = codec.encode(batch["picture"]).latents.float()
            made = codec.decode(latents + batch["noise"]).sample.float()
        # Latents near zero and of one size suit the noise schedule.
        tidy = latents.mean((0, 2, 3)).square().mean() + 0.01 * latents.square().mean()
        return reconstruction_loss(made, batch["picture"], batch["cover"]) + 0.05 * tidy

    make = scenes(shop, SEED)
    loop.train(
        "codec",
        shop.work,
        codec,
        make,
        loss_of,
        steps=shop.steps(STEPS),
        rate=RATE,
        average=0.995,
        graph=shop.graph,
    )
    codec.eval()
    with torch.no_grad():
        latents = torch.cat([codec.encode(make(10**7 + i)["picture"]).latents for i in range(4)])
    codec.register_to_config(scaling_factor=float(1 / latents.std()))
    codec.to("cpu", torch.float16).save_pretrained(shop.out / "vae", safe_serialization=True)
    # diffusers writes a setting that it then warns about: it follows from the decoder's.
    path = shop.out / "vae" / "config.json"
    settings = json.loads(path.read_text())
    settings.pop("block_out_channels", None)
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
