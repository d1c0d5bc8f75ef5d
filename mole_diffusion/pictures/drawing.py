"""Pictures by seed, the same in any batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image


def draw(pipe: Any, prompts: Sequence[str], seeds: Sequence[int], **settings: Any) -> list[Image]:
    """One picture per prompt, each from a generator of its own, so that its neighbours change nothing.

    Args:
        pipe: a pipeline of diffusers or of this package.
        prompts: as many as seeds.
        seeds: of the pictures.
        settings: for the pipeline's call.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    pictures: list[Image] = pipe(prompt=list(prompts), generator=generators, **settings).images
    return pictures
