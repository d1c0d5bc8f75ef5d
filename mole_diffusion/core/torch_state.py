"""What PyTorch is doing at the moment (autocast, a backward pass, compilation), and where tensors are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn

# The oldest supported torch can ask no device and knows these.
_is_autocast_available: Callable[[str], bool] = getattr(
    torch.amp, "is_autocast_available", lambda device: device in ("cpu", "cuda", "xpu")
)
_AUTOCAST_DEVICES = tuple(name for name in ("cpu", "cuda", "xpu", "mps") if _is_autocast_available(name))
# Newer than torch 2.1.
is_compiling: Callable[[], bool] = getattr(torch.compiler, "is_compiling", lambda: False)


def _old_is_autocast_enabled(device: str) -> bool:
    """For versions of torch that ask each device in a way of its own: True where it may be."""
    return device != "cuda" or torch.is_autocast_enabled()


try:
    torch.is_autocast_enabled("cpu")
    _is_autocast_enabled: Callable[[str], bool] = torch.is_autocast_enabled
except TypeError:
    _is_autocast_enabled = _old_is_autocast_enabled


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Gates are float32 and factors have the output's data type, also inside somebody's autocast."""
    if device.type in _AUTOCAST_DEVICES and _is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def eager() -> AbstractContextManager[object]:
    """Let what is compiled run as it was written inside the `with` block."""
    # Newer than torch 2.1.
    stance = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if stance is None else cast("AbstractContextManager[object]", stance("force_eager"))


def in_backward() -> bool:
    """Whether autograd is running, that is, whether a forward now is a recomputation."""
    if is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)


def has_compiled_parts(network: nn.Module) -> bool:
    """Whether modules of a network are compiled one by one, as by diffusers' `compile_repeated_blocks`."""
    return any(getattr(module, "_compiled_call_impl", None) is not None for module in network.modules())


# `Tensor.to` costs a call of PyTorch's dispatcher also where there is nothing to do.
def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; itself where it is there."""
    return tensor if tensor.device == device else tensor.to(device)


def as_type(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a data type; itself where it has that."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
