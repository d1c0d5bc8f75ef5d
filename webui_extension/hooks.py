"""Hooks on the host's UNet: regions follow the latent's size, texts must be known, errors are shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from .attachment import Attachment
    from .reading import TextReader

UNET = "unet"


class RegionHook:
    """Draws the rectangles anew when the latent's size changes: hires fix, an inpainted detail.

    Args:
        attachment: whose rectangles.
    """

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self._size: tuple[int, int] | None = None

    def register(self, network: nn.Module) -> RemovableHandle:
        """Run before the mixture's own hook, which already wants the masks."""
        return network.register_forward_pre_hook(self, with_kwargs=True, prepend=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See `torch.nn.Module.register_forward_pre_hook`."""
        latent = args[0] if args else kwargs.get("x")
        if not isinstance(latent, Tensor) or not self._attachment.attached:
            return
        size = (int(latent.shape[-2]), int(latent.shape[-1]))
        if size != self._size:
            self._attachment.activate_regions(size)
            self._size = size


class TextHook:
    """Sees to it that the UNet is given texts that the experts can be found by.

    Args:
        attachment: whose experts.
        reader: what has heard the host encode its texts.
    """

    def __init__(self, attachment: Attachment, reader: TextReader) -> None:
        self._attachment, self._reader = attachment, reader

    def register(self, network: nn.Module) -> RemovableHandle:
        """Run before the mixture's own hook, which already wants to know the texts."""
        return network.register_forward_pre_hook(self, with_kwargs=True, prepend=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See `torch.nn.Module.register_forward_pre_hook`."""
        attachment = self._attachment
        if not attachment.attached or not attachment.seeks or attachment.fallen_back is not None:
            return
        text = attachment.mixtures[UNET].architecture.forward(args, kwargs, None).text
        if text is None or any(one is None for one in self._reader.recognise(text)):
            attachment.fall_back("the UNet was given a text that the web UI did not encode for this picture")


class Refusal:
    """Makes the next run of a network fail with a message.

    Hosts log what a script raises in its callbacks and go on without it: a picture without the experts, and
    nobody knows. What the network raises they show to the user.

    Args:
        network: the UNet.
        error: what to say.
    """

    attached = True

    def __init__(self, network: nn.Module, error: Exception) -> None:
        self._error = error
        self._handle: RemovableHandle | None = network.register_forward_pre_hook(self._refuse, prepend=True)

    def _refuse(self, module: nn.Module, args: Any) -> None:
        self.detach()
        raise self._error

    def detach(self) -> None:
        """Let the network run."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None


def rectangle(region: tuple[float, float, float, float], height: int, width: int) -> Tensor:
    """(height, width) share of each cell that lies in a rectangle (left, top, width, height in shares)."""
    left, top, across, down = region
    return torch.outer(_covered(top, down, height), _covered(left, across, width))


def _covered(start: float, length: float, cells: int) -> Tensor:
    edges = torch.arange(cells + 1, dtype=torch.float64)
    low, high = edges[:-1].clamp_min(start * cells), edges[1:].clamp_max((start + length) * cells)
    return (high - low).clamp(0.0, 1.0).float()
