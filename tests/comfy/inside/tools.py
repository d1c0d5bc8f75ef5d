"""Drawing with ComfyUI's own sampler."""

from typing import Any

import comfy.sample
import torch
from torch import Tensor


def draw(
    model: Any, clip: Any, prompt: str, *, seed: int = 1, steps: int = 2, size: int = 128, cfg: float = 5.0
) -> Tensor:
    """A latent as KSampler makes it."""
    positive = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    negative = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    latent = torch.zeros(1, 4, size // 8, size // 8)
    noise = comfy.sample.prepare_noise(latent, seed)
    return comfy.sample.sample(
        model, noise, steps, cfg, "euler", "simple", positive, negative, latent, disable_pbar=True, seed=seed
    )


def hooks(network: torch.nn.Module) -> int:
    """How many hooks there are on a network and its parts."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())
