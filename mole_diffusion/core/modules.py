"""What a module is: the layer inside wrappers, its shape, its kernel; where a network computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def base_layer(module: nn.Module) -> nn.Module:
    """The layer inside any number of PEFT wrappers."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a Linear or convolution, also quantised or offloaded; a kernel does not count."""
    for names in (("out_features", "in_features"), ("out_channels", "in_channels")):
        if all(hasattr(module, name) for name in names):
            return int(getattr(module, names[0])), int(getattr(module, names[1]))
    weight: Any = module.weight
    return int(weight.shape[0]), int(weight.shape[1])


def kernel_size(module: nn.Module) -> tuple[int, int] | None:
    """(height, width) of a convolution's kernel; None for 1x1 and for Linears, which are plain products."""
    kernel: Any = getattr(module, "kernel_size", None)
    return None if kernel is None or tuple(kernel) == (1, 1) else tuple(kernel)


def runs_fused(holder: nn.Module) -> bool:
    """Whether a module that holds a fused projection runs it, and not the parts it may have too.

    Of diffusers' two ways of fusing one keeps both forms and lets the processor choose, whatever its flag
    says; the other takes the fused form away again.
    """
    processor = getattr(holder, "processor", None)
    if processor is None:
        return True
    if hasattr(holder, "unfuse_projections"):
        return bool(getattr(holder, "fused_projections", False))
    return type(processor).__name__.startswith("Fused")


def site_shape(module: nn.Module, rows: slice | None) -> tuple[int, int]:
    """(out, in) of a matrix, which may be some rows of a module's; a kernel does not count."""
    out, fan_in = matrix_shape(module)
    return (out if rows is None else rows.stop - rows.start), fan_in


class Arrangement:
    """Which projections a network runs, as far as the processors and the fusing of diffusers decide it."""

    def __init__(self, network: nn.Module) -> None:
        self._seen = [
            (module, getattr(module, "processor", None), getattr(module, "fused_projections", None))
            for module in network.modules()
            if hasattr(module, "processor")
        ]

    def changed(self) -> bool:
        """Whether an attention has another processor by now, or has been fused."""
        return any(
            module.processor is not processor or getattr(module, "fused_projections", None) is not fused
            for module, processor, fused in self._seen
        )


def unwrapped(network: nn.Module) -> nn.Module:
    """The network inside what `torch.compile` made of it."""
    inner = getattr(network, "_orig_mod", network)
    return inner if isinstance(inner, nn.Module) else network


def network_device(network: nn.Module) -> torch.device | None:
    """Where a network computes; None if it does not say.

    The weights of an offloaded network are elsewhere between two forwards: its hook (accelerate's) knows.
    """
    execution = getattr(getattr(network, "_hf_hook", None), "execution_device", None)
    if execution is not None:
        return torch.device(execution)
    return next((p.device for p in network.parameters() if p.device.type != "meta"), None)
