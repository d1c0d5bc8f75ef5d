"""The starter's base model: text encoder and UNet, trained together on drawn scenes (v-prediction)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel

from . import codec, loop, text, world
from .scenes import Dice
from .stage import STYLES
from .workshop import Pool, Workshop

SEED = 23
BATCH = 256
ROUNDS = ((3403, 1.2e-3), (4201, 8e-4))
"""Steps and largest rate of each round; each begins with what the one before it saved, and new scenes."""
CHUNK, CHUNKS, EVERY = 128, 160, 5


def new_unet() -> UNet2DConditionModel:
    """SD 2's layout (linear projections, head dimension fixed) at 16 x 16 latents, three resolutions."""
    return UNet2DConditionModel(
        sample_size=world.SIZE // 8,
        in_channels=codec.CHANNELS,
        out_channels=codec.CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(128, 192, 256),
        layers_per_block=1,
        cross_attention_dim=192,
        attention_head_dim=(4, 6, 8),  # diffusers reads this as the number of heads: 32 channels each
        use_linear_projection=True,
    )


def new_scheduler() -> DDIMScheduler:
    """SD's noise schedule, rescaled to zero terminal SNR; v-prediction (Lin et al. 2023)."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


class Noise:
    """Adds noise and gives v targets, with the schedule's table on one device."""

    def __init__(self, device: torch.device) -> None:
        table: Tensor = new_scheduler().alphas_cumprod.to(device)
        self.signal, self.spread = table.sqrt(), (1 - table).sqrt()
        self.last = len(table)

    def timesteps(self, dice: Dice, groups: int, count: int) -> Tensor:
        """Timesteps spread evenly over each of `groups` groups of `count`, (groups * count,)."""
        slots = torch.arange(count, device=self.signal.device).repeat(groups)
        spread = (slots + dice.uniform(groups * count)) / count
        return (spread * self.last).long().clamp(max=self.last - 1)

    def add(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents and the v that belongs to them."""
        signal = self.signal[timesteps].view(-1, 1, 1, 1)
        spread = self.spread[timesteps].view(-1, 1, 1, 1)
        return signal * latents + spread * noise, signal * noise - spread * latents

    def batch(self, rows: Mapping[str, Tensor], dice: Dice, groups: int) -> loop.Batch:
        """What a training step reads, of rows of clean latents that stand in `groups` groups of one size."""
        latents = rows["latents"]
        timesteps = self.timesteps(dice, groups, len(latents) // groups)
        noisy, target = self.add(latents, dice.normal(*latents.shape), timesteps)
        rest = {name: value for name, value in rows.items() if name != "latents"}
        return {**rest, "timesteps": timesteps, "noisy": noisy, "target": target}

    def clean(self, noisy: Tensor, v: Tensor, timesteps: Tensor) -> Tensor:
        """The latents that a predicted v stands for."""
        return self.signal[timesteps].view(-1, 1, 1, 1) * noisy - self.spread[timesteps].view(-1, 1, 1, 1) * v


def denoising_loss(predicted: Tensor, target: Tensor, foreground: Tensor, emphasis: float = 2.0) -> Tensor:
    """Mean squared error; objects count `1 + emphasis` times (backgrounds are easy, and large)."""
    weight = 1 + emphasis * foreground
    return ((predicted - target).square() * weight).mean() / weight.mean()


def denoising(shop: Workshop, module: nn.ModuleDict, emphasis: float = 2.0) -> Callable[[loop.Batch], Tensor]:
    """The loss of text encoder and UNet on a batch of `Noise.batch`; see `denoising_loss`."""
    unet: Any = module["unet"]
    encoder: Any = module["text_encoder"]
    if shop.device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())  # on CPU the backward pass of fused attention is slower

    def loss_of(batch: loop.Batch) -> Tensor:
        with shop.mixed_precision():
            context = encoder(batch["ids"])[0]
            predicted = unet(batch["noisy"], batch["timesteps"], context).sample.float()
        return denoising_loss(predicted, batch["target"], batch["cover"], emphasis)

    return loss_of


def ordinary_rows(shop: Workshop, seed: int) -> Pool:
    """Latents, cover and captions of the base's scenes.

    One in twelve names is preceded by a trigger word that changes nothing, and some captions carry a style
    word, so that untrained triggers leave the base's picture alone.
    """

    def make(number: int, count: int) -> loop.Batch:
        dice = shop.dice(seed, number)
        scenes = shop.director.ordinary(dice, count)
        pictures, cover = shop.stage.draw(scenes, dice.below(1000, count), plain=True)
        words = shop.captions.trigger[dice.below(len(world.TRIGGERS), count, 3)]
        before = torch.where(dice.share(1 / 12, count, 3), words, 0)
        style = torch.where(dice.share(0.04, count), 1 + dice.below(len(STYLES), count), 0)
        caption = shop.captions.compose(scenes, before=before, place=dice.share(0.92, count), style=style)
        return {
            "latents": shop.encode(pictures),
            "cover": F.avg_pool2d(cover, 8),
            "ids": shop.captions.tokens(caption),
        }

    return Pool(make, CHUNK, shop.amount(CHUNKS), EVERY)


def ordinary_batches(shop: Workshop, seed: int) -> Callable[[int, Dice], loop.Batch]:
    """The base's rows of a step, of which a tenth has an empty caption."""
    pool, size = ordinary_rows(shop, seed), shop.amount(BATCH)
    empty = shop.captions.tokens(torch.zeros(1, 1, dtype=torch.long, device=shop.device))

    def rows_of(step: int, dice: Dice) -> loop.Batch:
        rows = pool.sample(step, size, dice)
        rows["ids"] = torch.where(dice.share(0.1, size, 1), empty, rows["ids"])
        return rows

    return rows_of


def train_base(shop: Workshop) -> None:
    """Train text encoder and UNet round by round; writes their averaged weights in half precision."""
    for number in range(len(ROUNDS)):
        train_round(shop, number)
    new_scheduler().save_pretrained(shop.out / "scheduler")


def train_round(shop: Workshop, number: int) -> None:
    """One round of the base's training; the first starts at random weights, the others in `shop.out`."""
    steps, rate = ROUNDS[number]
    seed = SEED + 100 * number
    torch.manual_seed(seed)
    if number:
        networks: dict[str, nn.Module] = {
            "unet": load_unet(shop.out),
            "text_encoder": load_text_encoder(shop.out),
        }
    else:
        networks = {"unet": new_unet(), "text_encoder": text.new_text_encoder(shop.tokenizer)}
    module = nn.ModuleDict(networks).train()
    module.to(shop.device, memory_format=torch.channels_last)
    rows_of, noise = ordinary_batches(shop, seed), Noise(shop.device)

    def make(step: int) -> loop.Batch:
        dice = shop.dice(seed, 1, step)
        return noise.batch(rows_of(step, dice), dice, 1)

    loop.train(
        f"base-{number + 1}",
        shop.work,
        module,
        make,
        denoising(shop, module),
        steps=shop.steps(steps),
        rate=rate,
        average=0.999,
        checkpoint_every=3000,
        graph=shop.graph,
    )
    save_base(shop.out, module)


def save_base(out: Path, module: nn.ModuleDict) -> None:
    """Write UNet and text encoder as half-precision safetensors."""
    for name, network in module.items():
        writer: Any = network.to("cpu", torch.float16)
        writer.save_pretrained(out / name, safe_serialization=True)


def load_unet(out: Path) -> UNet2DConditionModel:
    """The UNet of the starter in `out`."""
    return UNet2DConditionModel.from_pretrained(out / "unet", torch_dtype=torch.float32)


def load_text_encoder(out: Path) -> CLIPTextModel:
    """The text encoder of the starter in `out`."""
    return CLIPTextModel.from_pretrained(out / "text_encoder", torch_dtype=torch.float32)
