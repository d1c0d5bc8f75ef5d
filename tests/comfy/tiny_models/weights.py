"""Random weights, and a codec."""

from __future__ import annotations

from typing import Any

import comfy.sd
import comfy.taesd.taesd
import torch


def fill(network: torch.nn.Module, seed: int) -> None:
    """ComfyUI leaves weights as the memory was."""
    draws = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if value.is_floating_point() and value.dim():
            random = torch.randn(value.shape, generator=draws)
            norm = value.dim() == 1 and name.endswith(("weight", "scale"))
            value.copy_(1 + 0.1 * random if norm else random * (0.5 * value.shape[-1] ** -0.5))


def codec(channels: int) -> Any:
    """A VAE of ComfyUI for latents of so many channels."""
    draws = torch.Generator().manual_seed(2)
    weights = comfy.taesd.taesd.TAESD(latent_channels=channels).state_dict()
    for value in weights.values():
        if value.dim():
            value.copy_(torch.randn(value.shape, generator=draws) * max(value[0].numel(), 9) ** -0.5)
    return comfy.sd.VAE(weights)
