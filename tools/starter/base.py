"""The starter's base model: text encoder and UNet, trained together on rendered scenes (v-prediction)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from mole_diffusion.starter.judge import to_tensor

from . import loop, text, world

SEED = 23
BATCH = 64
PHASES = (("base-first", 23, 1900, 1.2e-3), ("base-further", 29, 1150, 9e-4))
"""Name, seed, steps and peak learning rate; each phase starts from the averaged weights of the one before."""
CHUNK, REUSE, CHUNKS = 64, 8, 64


def new_unet() -> UNet2DConditionModel:
    """SD 2's layout (linear projections, head dimension fixed) at 16 x 16 latents, three resolutions."""
    return UNet2DConditionModel(
        sample_size=world.SIZE // 8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(96, 192, 256),
        layers_per_block=1,
        cross_attention_dim=192,
        attention_head_dim=(3, 6, 8),  # diffusers reads this as the number of heads: 32 channels each
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


class LatentPool:
    """Latents of freshly drawn scenes, replaced in turn: each scene is used ``REUSE`` times on average.

    What the pool holds at a step follows from the step's number alone, so training resumes exactly.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        draw: Callable[[np.random.Generator], world.Scene],
        seed: int,
        chunks: int = CHUNKS,
    ) -> None:
        self.vae, self.draw, self.seed, self.chunks = vae, draw, seed, chunks
        self.held: dict[int, tuple[Tensor, Tensor, list[str]]] = {}

    @torch.no_grad()
    def _chunk(self, number: int) -> tuple[Tensor, Tensor, list[str]]:
        rng = np.random.default_rng([self.seed, number])
        scenes = [self.draw(rng) for _ in range(CHUNK)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            moments = self.vae.encode(to_tensor(np.stack([s.pixels for s in scenes]))).latent_dist
        latents = moments.mode().float() * self.vae.config.scaling_factor
        foreground = F.avg_pool2d(torch.from_numpy(np.stack([s.foreground for s in scenes]))[:, None], 8)
        return latents.contiguous(), foreground, [s.caption for s in scenes]

    def sample(self, step: int, batch: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, list[str]]:
        """Latents (batch, 4, 16, 16), foreground share (batch, 1, 16, 16) and captions for one step."""
        newest = self.chunks - 1 + step * batch // (CHUNK * REUSE)
        wanted = range(newest - self.chunks + 1, newest + 1)
        self.held = {n: self.held.get(n) or self._chunk(n) for n in wanted}
        picks = [
            (int(rng.integers(wanted.start, wanted.stop)), int(rng.integers(CHUNK))) for _ in range(batch)
        ]
        latents = torch.stack([self.held[n][0][i] for n, i in picks])
        foreground = torch.stack([self.held[n][1][i] for n, i in picks])
        return latents, foreground, [self.held[n][2][i] for n, i in picks]


def noised(scheduler: DDIMScheduler, latents: Tensor, seed: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, timesteps (spread evenly over the batch) and v targets, all from ``seed``."""
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(list(seed)).generate_state(1)[0]))
    count, last = len(latents), int(scheduler.config.num_train_timesteps)
    spread = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    timesteps = (spread * last).long().clamp(max=last - 1)
    noise = torch.randn(latents.shape, generator=generator)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    return noisy, timesteps, scheduler.get_velocity(latents, noise, timesteps)


def denoising_loss(predicted: Tensor, target: Tensor, foreground: Tensor, emphasis: float = 2.0) -> Tensor:
    """Mean squared error; objects count ``1 + emphasis`` times (backgrounds are easy, and large)."""
    weight = 1 + emphasis * foreground
    return ((predicted - target).square() * weight).mean() / weight.mean()


def load_codec(out: Path) -> tuple[AutoencoderKL, CLIPTokenizer]:
    """VAE and tokenizer of the starter in `out`, frozen."""
    vae = AutoencoderKL.from_pretrained(out / "vae", torch_dtype=torch.float32).eval().requires_grad_(False)
    return vae.to(memory_format=torch.channels_last), CLIPTokenizer.from_pretrained(out / "tokenizer")


def train_base(work: Path, out: Path) -> None:
    """Train text encoder and UNet; writes their averaged weights in half precision.

    Args:
        work: folder for checkpoints.
        out: the starter's folder, with the finished codec.
    """
    vae, tokenizer = load_codec(out)
    torch.manual_seed(SEED)
    module = nn.ModuleDict({"unet": new_unet(), "text_encoder": text.new_text_encoder(tokenizer)})
    unet: Any = module["unet"]
    unet.set_attn_processor(AttnProcessor())  # on CPU the backward pass of fused attention is slower
    for name, seed, steps, rate in PHASES:
        average = loop.Average(module, 0.999)
        loss_of = base_loss(module, vae, tokenizer, seed)
        loop.train(name, work, module, loss_of, steps=steps, rate=rate, average=average)
        average.copy_to(module)
    save_base(out, module)
    new_scheduler().save_pretrained(out / "scheduler")


def base_loss(
    module: nn.ModuleDict, vae: AutoencoderKL, tokenizer: CLIPTokenizer, seed: int
) -> Callable[[int], Tensor]:
    """Denoising loss of one step on freshly drawn scenes; a tenth of the captions is empty."""
    unet, encoder = module["unet"], module["text_encoder"]
    scheduler = new_scheduler()
    pool = LatentPool(vae, world.base_scene, seed)

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng([seed, 1, step])
        latents, foreground, captions = pool.sample(step, BATCH, rng)
        captions = ["" if rng.random() < 0.1 else caption for caption in captions]
        noisy, timesteps, target = noised(scheduler, latents, [seed, 2, step])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            context = encoder(text.tokenise(tokenizer, captions))[0]
            predicted = unet(noisy, timesteps, context).sample.float()
        return denoising_loss(predicted, target, foreground)

    return loss_of


def save_base(out: Path, module: nn.ModuleDict) -> None:
    """Write UNet and text encoder as half-precision safetensors."""
    for name, network in module.items():
        writer: Any = network.half()
        writer.save_pretrained(out / name, safe_serialization=True)


def load_unet(out: Path) -> UNet2DConditionModel:
    """The UNet of the starter in `out`."""
    return UNet2DConditionModel.from_pretrained(out / "unet", torch_dtype=torch.float32)


def load_text_encoder(out: Path) -> CLIPTextModel:
    """The text encoder of the starter in `out`."""
    return CLIPTextModel.from_pretrained(out / "text_encoder", torch_dtype=torch.float32)
