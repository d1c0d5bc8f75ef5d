"""Autoencoders of diffusers: the one way from pictures to latents and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def encode(autoencoder: Any, pictures: Tensor) -> Tensor:
    """Latents, the means, float32, of pictures (batch, 3, H, W) in 0..1."""
    encoded = autoencoder.encode((pictures * 2 - 1).to(autoencoder.device, autoencoder.dtype))
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    shifted: Tensor = (latents - _shift(autoencoder)) * autoencoder.config.scaling_factor
    return shifted.float()


def decode(autoencoder: Any, latents: Tensor) -> Tensor:
    """Pictures (batch, 3, H, W) in 0..1, float32, of latents, with gradient."""
    latents = latents / autoencoder.config.scaling_factor + _shift(autoencoder)
    pictures: Tensor = autoencoder.decode(latents.to(autoencoder.dtype)).sample
    return (pictures.float() / 2 + 0.5).clamp(0, 1)


def _shift(autoencoder: Any) -> float:
    return getattr(autoencoder.config, "shift_factor", None) or 0.0


@contextmanager
def gradient_checkpointing(modules: Iterable[Any]) -> Iterator[None]:
    """Switch on the gradient checkpointing of diffusers models, and off again where it was off."""
    changed = [module for module in modules if not module.is_gradient_checkpointing]
    for module in changed:
        module.enable_gradient_checkpointing()
    try:
        yield
    finally:
        for module in changed:
            module.disable_gradient_checkpointing()


@contextmanager
def full_precision(autoencoder: Any) -> Iterator[None]:
    """Let an autoencoder that overflows in float16 (SDXL's) compute in float32; undone without a loss."""
    widened = autoencoder.dtype == torch.float16 and autoencoder.config.get("force_upcast")
    if widened:
        autoencoder.to(torch.float32)
    try:
        yield
    finally:
        if widened:
            autoencoder.to(torch.float16)


class SmallDecoder:
    """An `AutoencoderTiny` that decodes for CLIP in place of the VAE: faster, and nearly the same.

    Args:
        source: folder or hub id.
        device: where it runs.
    """

    def __init__(self, source: str, device: torch.device) -> None:
        from diffusers import AutoencoderTiny

        self.network = AutoencoderTiny.from_pretrained(source).to(device)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (batch, 3, H, W) in 0..1 of latents, with gradient."""
        return decode(self.network, latents)

    @contextmanager
    def training(self, *, checkpointing: bool) -> Iterator[None]:
        """As `Denoiser.training`."""
        with full_precision(self.network), gradient_checkpointing([self.network] if checkpointing else []):
            yield
