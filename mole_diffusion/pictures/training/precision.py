"""Networks of diffusers for a while as training needs them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def gradient_checkpointing(modules: Iterable[Any], wanted: bool) -> Iterator[None]:
    """Switch on the gradient checkpointing of diffusers models, and off again where it was off."""
    changed = [module for module in modules if wanted and not module.is_gradient_checkpointing]
    for module in changed:
        module.enable_gradient_checkpointing()
    try:
        yield
    finally:
        for module in changed:
            module.disable_gradient_checkpointing()


@contextmanager
def full_precision(decoders: Iterable[Any]) -> Iterator[None]:
    """Let autoencoders that overflow in float16 (SDXL's) compute in float32; undone without a loss."""
    widened = [
        decoder
        for decoder in {id(decoder): decoder for decoder in decoders}.values()
        if decoder.dtype == torch.float16 and decoder.config.get("force_upcast")
    ]
    for decoder in widened:
        decoder.to(torch.float32)
    try:
        yield
    finally:
        for decoder in widened:
            decoder.to(torch.float16)
