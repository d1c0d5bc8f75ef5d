"""Drawing with ComfyUI's own sampler."""

from typing import Any

import comfy.sample
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def encoded(clip: Any, prompt: str) -> tuple[Any, Any]:
    """The prompt and the empty one."""
    positive = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    return positive, clip.encode_from_tokens_scheduled(clip.tokenize(""))


def sample(
    model: Any, texts: tuple[Any, Any], *, seed: int = 1, steps: int = 2, size: int = 128, cfg: float = 5.0
) -> Tensor:
    """A latent as KSampler makes it."""
    empty = torch.zeros(1, 4, size // 8, size // 8)
    latent = comfy.sample.fix_empty_latent_channels(model, empty)
    noise = comfy.sample.prepare_noise(latent, seed)
    return comfy.sample.sample(
        model, noise, steps, cfg, "euler", "simple", *texts, latent, disable_pbar=True, seed=seed
    )


def draw(model: Any, clip: Any, prompt: str, **options: Any) -> Tensor:
    """`sample` for a prompt."""
    return sample(model, encoded(clip, prompt), **options)


def hooks(network: torch.nn.Module) -> int:
    """How many hooks there are on a network and its parts."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


class Operations(TorchDispatchMode):
    """Counts what torch computes inside the `with` block: no clock, so that it is the same on any machine."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))
