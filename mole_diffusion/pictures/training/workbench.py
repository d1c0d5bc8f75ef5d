"""What all objectives share: networks, random draws, sampling and the pass counter."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mole_diffusion.core.errors import TrainingError
from mole_diffusion.pictures.training.conditions import TextCondition, encode
from mole_diffusion.pictures.training.config import Pictures
from mole_diffusion.pictures.training.rollout import PassCounter, Sampler, training_scheduler


class Draws:
    """The trainer's own generators, torch's and Python's; global ones stay untouched."""

    def __init__(self, seed: int) -> None:
        self.tensors = torch.Generator().manual_seed(seed)
        self.choices = random.Random(seed)

    def state_dict(self) -> dict[str, Any]:
        """Both states."""
        return {"tensors": self.tensors.get_state(), "choices": self.choices.getstate()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.tensors.set_state(state["tensors"])
        version, numbers, gauss = state["choices"]
        self.choices.setstate((version, tuple(numbers), gauss))


@dataclass
class Workbench:
    """Everything an objective needs.

    Args:
        pipe: The pipeline, with experts.
        settings: How pictures are drawn.
        seed: Seed of everything that is drawn.
        small_decoder: Folder or hub id of an `AutoencoderTiny` that decodes for CLIP; None for the VAE.
    """

    pipe: Any
    settings: Pictures
    seed: int
    small_decoder: str | None = None
    decoder: Any = field(init=False)
    draws: Draws = field(init=False)
    counter: PassCounter = field(default_factory=PassCounter)
    sampler: Sampler = field(init=False)

    def __post_init__(self) -> None:
        channels = self.pipe.unet.config.in_channels
        if channels != self.latent_shape[0]:
            raise TrainingError(
                f"gates of this UNet cannot be trained: it reads {channels} channels, latents have"
                f" {self.latent_shape[0]} (an inpainting UNet reads mask and picture too); train on the base"
            )
        self.draws = Draws(self.seed)
        self.decoder = self.pipe.vae if self.small_decoder is None else _tiny(self.small_decoder, self.device)
        scheduler = training_scheduler(self.pipe.scheduler)
        self.sampler = Sampler(self.pipe.unet, scheduler, self.settings.guidance, self.counter)

    @property
    def device(self) -> torch.device:
        """Where the UNet runs."""
        device: torch.device = self.pipe.unet.device
        return device

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of the pictures in pixels."""
        if self.settings.resolution is not None:
            return self.settings.resolution, self.settings.resolution
        size, factor = self.pipe.unet.config.sample_size, self.pipe.vae_scale_factor
        rows, columns = (size, size) if isinstance(size, int) else size
        return rows * factor, columns * factor

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of one latent."""
        height, width = self.picture_size
        factor = self.pipe.vae_scale_factor
        return self.pipe.vae.config.latent_channels, height // factor, width // factor

    def autocast(self) -> Any:
        """bfloat16 for the frozen networks, where asked for."""
        if not self.settings.autocast:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def encode_texts(self, texts: Sequence[str]) -> tuple[TextCondition, TextCondition]:
        """The texts, and the empty prompt alone, encoded in one pass, with gradient.

        Equal texts are encoded once.
        """
        unique = list(dict.fromkeys(["", *texts]))
        encoded = encode(self.pipe, unique, self.picture_size, self.device)
        return encoded[[unique.index(text) for text in texts]], encoded[:1]

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (batch, 3, H, W) in 0..1 from latents, with gradient, for CLIP."""
        self.counter.decoded += 1
        return _decode(self.decoder, latents)

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Latents (batch, 4, h, w), the VAE's means, of pictures (batch, 3, H, W) in 0..1; no gradient."""
        vae = self.pipe.vae
        with self.autocast():
            encoded = vae.encode((pictures * 2 - 1).to(vae.device, vae.dtype))
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        shifted: Tensor = (
            latents - (getattr(vae.config, "shift_factor", None) or 0.0)
        ) * vae.config.scaling_factor
        return shifted.float()

    @torch.no_grad()
    def draw(self, texts: Sequence[str], draws: torch.Generator, **composition: Any) -> Tensor:
        """Draw one picture per text: (len(texts), 3, H, W) in 0..1, in steps of 1/255 so that it survives a
        file.

        Args:
            texts: The prompts.
            draws: Generator of the noise.
            composition: Which experts count, as for ``pipe.composing``.
        """
        with self.pipe.composing(**composition), self.autocast():
            text, empty = self.encode_texts(texts)
            latents = self.sampler.sample(self.settings.sampling_steps, text, empty, self.latent_shape, draws)
            pictures = _decode(self.pipe.vae, latents)
        return (pictures * 255).round().cpu() / 255


def _tiny(source: str, device: torch.device) -> Any:
    from diffusers import AutoencoderTiny

    return AutoencoderTiny.from_pretrained(source).to(device)


def _decode(decoder: Any, latents: Tensor) -> Tensor:
    latents = latents / decoder.config.scaling_factor + (getattr(decoder.config, "shift_factor", None) or 0.0)
    pictures: Tensor = decoder.decode(latents.to(decoder.dtype)).sample
    return (pictures.float() / 2 + 0.5).clamp(0, 1)


def picture_tensor(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """A PIL picture as (3, H, W) in 0..1, scaled to cover ``size`` and cropped to its centre."""
    height, width = size
    picture = picture.convert("RGB")
    scale = max(height / picture.height, width / picture.width)
    scaled = picture.resize(
        (max(width, round(picture.width * scale)), max(height, round(picture.height * scale))),
        Image.Resampling.LANCZOS,
    )
    left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
    pixels = np.asarray(scaled.crop((left, top, left + width, top + height)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def tensor_picture(pixels: Tensor) -> Image.Image:
    """(3, H, W) in 0..1 as a PIL picture."""
    return Image.fromarray((pixels.detach().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())
