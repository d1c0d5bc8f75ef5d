"""The denoising loss: what gates, experts and single concepts are trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mole_diffusion.pictures.denoiser import Denoiser


@dataclass(frozen=True)
class NoisyBatch:
    """Latents with noise at random times, and what a network should say of them.

    Attributes:
        noisy: (batch, c, h, w).
        times: (batch,).
        target: (batch, c, h, w).
    """

    noisy: Tensor
    times: Tensor
    target: Tensor

    @classmethod
    def draw(
        cls,
        denoiser: Denoiser,
        latents: Tensor,
        draws: torch.Generator,
        times: Callable[[int, torch.Generator], Tensor] | None = None,
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
        return cls(denoiser.noisy(latents, noise, when), when, denoiser.target(latents, noise, when))

    def __len__(self) -> int:
        return len(self.times)


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
