"""The denoising loss: what gates, experts and single concepts are trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mole_diffusion.pictures.denoiser import Denoiser

#: Draws times (count,).
Times = Callable[[int, torch.Generator], Tensor]


@dataclass(frozen=True)
class NoisyBatch:
    """Latents with noise at random times, and what a network should say of them.

    Attributes:
        noisy: (batch, c, h, w).
        times: (batch,).
        target: (batch, c, h, w).
        latents, noise: what `noisy` is made of.
    """

    noisy: Tensor
    times: Tensor
    target: Tensor
    latents: Tensor
    noise: Tensor

    @classmethod
    def draw(
        cls,
        denoiser: Denoiser,
        latents: Tensor,
        draws: torch.Generator,
        times: Times | None = None,
    ) -> NoisyBatch:
        """Noise a batch: first the noise is drawn, then the times.

        Args:
            denoiser: whose noise levels; the batch goes to its device.
            latents: clean, (batch, c, h, w).
            draws: generator, on the CPU.
            times: draws times (count,); None is `denoiser.random_times`.
        """
        device = denoiser.device
        noise = torch.randn(latents.shape, generator=draws).to(device)
        when = (times or denoiser.random_times)(len(latents), draws).to(device)
        latents = latents.to(device)
        noisy, target = denoiser.noisy(latents, noise, when), denoiser.target(latents, noise, when)
        return cls(noisy, when, target, latents, noise)

    def __len__(self) -> int:
        return len(self.times)

    def __getitem__(self, rows: Any) -> NoisyBatch:
        return NoisyBatch(*(getattr(self, field.name)[rows] for field in fields(self)))


def denoising_loss(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error in float32.

    Args:
        prediction: (batch, c, h, w).
        target: The same shape.
        weights: (batch, 1, h, w), from 0; they are normalised, so the loss does not depend on their size.
            None weighs everything alike.

    Returns:
        A scalar.
    """
    squares = (prediction.float() - target.float()).square()
    if weights is None:
        return squares.mean()
    return (squares.mean(dim=1, keepdim=True) * weights).sum() / weights.sum().clamp_min(1e-6)
