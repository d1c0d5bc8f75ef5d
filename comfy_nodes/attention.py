"""ComfyUI's choice of attention, where it is read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor

from mole_diffusion.core.seen_attention import is_reading

#: What ComfyUI's networks are told to attend with.
ATTENTION = "optimized_attention_override"


def plain_attention(_: Any, *args: Any, **kwargs: Any) -> Tensor:
    """PyTorch's own attention in place of ComfyUI's choice, which may have no gradient."""
    result: Tensor = attention_pytorch(*args, **kwargs)
    return result


def let_attention_be_read(model: Any) -> None:
    """Let a MODEL attend with PyTorch's own function in the layers that are read, while they are.

    Args:
        model: ComfyUI's ModelPatcher; what another node chose for it stays for all else.
    """
    options = model.model_options.setdefault("transformer_options", {})
    options[ATTENTION] = partial(_attend, options.get(ATTENTION))


def _attend(
    chosen: Callable[..., Tensor] | None, usual: Callable[..., Tensor], *args: Any, **kwargs: Any
) -> Tensor:
    if is_reading():
        return plain_attention(usual, *args, **kwargs)
    return usual(*args, **kwargs) if chosen is None else chosen(usual, *args, **kwargs)
