"""The starter's picture codec: an f8 AutoencoderKL with four latent channels, trained on rendered scenes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from mole_diffusion.starter.judge import to_tensor

from . import loop, world

STEPS_CROPS, STEPS_WHOLE, STEPS_DECODER = 1900, 500, 1000
SEED = 11


def new_vae() -> AutoencoderKL:
    """SD's layout at a fraction of its width; GroupNorm keeps 32 groups, as LDM-named hosts hard-code."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(64, 64, 128, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=world.SIZE,
    )


def any_scene(rng: np.random.Generator) -> world.Scene:
    """A scene of everything the codec must carry: flat objects, subjects, and the two drawn styles."""
    count = int(rng.integers(1, 4))
    styles = world.FLAT_STYLES if rng.random() < 0.6 else (world.SUBJECT_STYLE,)
    kinds = world.random_kinds(count, rng)
    things = [world.Thing(k, styles[int(rng.integers(len(styles)))]) for k in kinds]
    scene = world.draw_scene(things, list(world.BACKGROUNDS)[int(rng.integers(len(world.BACKGROUNDS)))], rng)
    if rng.random() < 0.1:
        pixels = world.apply_style(scene.pixels, list(world.STYLES)[int(rng.integers(2))])
        return world.Scene(
            pixels, scene.foreground, scene.caption, scene.things, scene.background, scene.boxes
        )
    return scene


def _batch(step: int, count: int, crop: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng([SEED, step])
    pictures, weights = [], []
    for _ in range(count):
        scene = any_scene(rng)
        x, y = rng.integers(0, world.SIZE - crop + 1, 2)
        pictures.append(scene.pixels[y : y + crop, x : x + crop])
        weights.append(scene.foreground[y : y + crop, x : x + crop])
    return to_tensor(np.stack(pictures)), torch.from_numpy(np.stack(weights))[:, None]


def reconstruction_loss(made: Tensor, wanted: Tensor, foreground: Tensor) -> Tensor:
    """Absolute error and error of neighbour differences; objects count three times as much as background."""
    weight = (1 + 2 * foreground) / (1 + 2 * foreground).mean()
    pixel = (weight * (made - wanted).abs()).mean()
    edges = sum((torch.diff(made, dim=d) - torch.diff(wanted, dim=d)).abs().mean() for d in (2, 3))
    coarse = F.l1_loss(F.avg_pool2d(made, 4), F.avg_pool2d(wanted, 4))
    total: Tensor = pixel + edges + 0.5 * coarse
    return total


def train_vae(work: Path, out: Path) -> None:
    """Train on 64-pixel crops, then on whole pictures; ``scaling_factor`` is 1 / the latents' deviation."""
    torch.manual_seed(SEED)
    vae = new_vae().to(memory_format=torch.channels_last)

    def loss_for(picture: Tensor, foreground: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            posterior = vae.encode(picture).latent_dist
            made = vae.decode(posterior.sample()).sample.float()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss: Tensor = reconstruction_loss(made, picture, foreground) + 1e-3 * divergence
        return loss

    compiled = torch.compile(loss_for)

    def crops(step: int) -> Tensor:
        loss: Tensor = compiled(*_batch(step, 16, 64))
        return loss

    def whole(step: int) -> Tensor:
        loss: Tensor = compiled(*_batch(10**6 + step, 4, world.SIZE))
        return loss

    loop.train("vae-crops", work, vae, crops, steps=STEPS_CROPS, rate=1.5e-3)
    # The statistics of the group norms over a whole picture differ from those over a crop.
    loop.train("vae-whole", work, vae, whole, steps=STEPS_WHOLE, rate=4e-4)
    vae.eval()
    with torch.no_grad():
        latents = vae.encode(_batch(10**7, 256, world.SIZE)[0]).latent_dist.mode()
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    vae.to(torch.float16).save_pretrained(out, safe_serialization=True)


def refine_decoder(work: Path, out: Path) -> None:
    """Train the decoder further on latents of the finished encoder, slightly noisy as a generator's are.

    The encoder stays as it is, so the base model needs no retraining and may be trained before.
    """
    torch.manual_seed(SEED + 1)
    vae = AutoencoderKL.from_pretrained(out / "vae", torch_dtype=torch.float32)
    vae.to(memory_format=torch.channels_last).requires_grad_(False)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    spread = 1 / vae.config.scaling_factor

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng([SEED, 3, step])
        picture, foreground = _batch(2 * 10**6 + step, 6, world.SIZE)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(picture).latent_dist.mode().float()
            noise = torch.from_numpy(rng.standard_normal(latents.shape, np.float32))
            amount = torch.from_numpy(rng.uniform(0, 0.06, (len(latents), 1, 1, 1)).astype(np.float32))
            made = vae.decode(latents + spread * amount * noise).sample.float()
        return reconstruction_loss(made, picture, foreground)

    loop.train("decoder", work, vae, loss_of, steps=STEPS_DECODER, rate=6e-4)
    vae.to(torch.float16).save_pretrained(out / "vae", safe_serialization=True)
