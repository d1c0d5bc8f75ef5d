"""Cancel in the middle of a network's forward: a step of a large model takes long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def stoppable(pipe: Any, check: Callable[[], None]) -> Iterator[None]:
    """Call `check` before every block of the pipeline's networks; what it raises ends the forward.

    Args:
        pipe: a diffusers pipeline.
        check: raises `Cancelled` where the work is to stop.
    """
    networks = [part for part in pipe.components.values() if isinstance(part, nn.Module)]

    def look(*_: Any) -> None:
        check()

    handles = [block.register_forward_pre_hook(look) for network in networks for block in _blocks(network)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The network itself and its layers, as far as it keeps them in lists."""
    yield network
    for module in network.modules():
        if isinstance(module, nn.ModuleList):
            yield from module
