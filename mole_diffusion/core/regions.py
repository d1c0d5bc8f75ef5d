"""Region masks: where in a picture experts may act, on any grid of tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import functional
from .errors import RegionMaskError
from .torch_state import is_compiling


class RegionMasks:
    """Region masks of a picture, resized to any token grid on demand.

    Args:
        masks: expert index -> (H, W) in 0..1, validated.
        experts: N. Experts without a mask are allowed everywhere.
        active: indices of active experts; the others get 0.
    """

    def __init__(self, masks: Mapping[int, Tensor], experts: int, active: tuple[int, ...]) -> None:
        self._masks = dict(masks)
        self._experts = experts
        self._active = active
        self._grids: dict[tuple[int, int, torch.device], Tensor] = {}

    def check_aspect(self, latent_size: tuple[int, int]) -> None:
        """Raise RegionMaskError if a mask is not of the latent's proportions."""
        height, width = latent_size
        for mask in self._masks.values():
            rows, columns = mask.shape
            if rows * width != columns * height:
                raise RegionMaskError(
                    f"A region mask of {rows} x {columns} (height x width) does not have the proportions of "
                    f"the latent, {height} x {width}; draw it at the picture's size."
                )

    def on_grid(self, height: int, width: int, device: torch.device) -> Tensor:
        """(height * width, N) masks of a token grid."""
        if is_compiling():  # blocks that find what others left here would not be like these
            return self._laid(height, width, device)
        key = (height, width, device)
        if key not in self._grids:
            with torch.inference_mode(False):
                self._grids[key] = self._laid(height, width, device)
        return self._grids[key]

    def _laid(self, height: int, width: int, device: torch.device) -> Tensor:
        columns = [self._column(index, height, width) for index in range(self._experts)]
        return torch.stack(columns, dim=-1).to(device)

    def everywhere(self, tokens: int, device: torch.device) -> Tensor:
        """(tokens, N) masks of tokens that are nowhere in the picture: all active experts are allowed."""
        allowed = functional.active_mask(self._active, self._experts, device).float()
        return allowed.expand(tokens, -1)

    def _column(self, index: int, height: int, width: int) -> Tensor:
        if index not in self._active:
            return torch.zeros(height * width)
        if index not in self._masks:
            return torch.ones(height * width)
        return functional.resize_mask(self._masks[index], (height, width)).flatten()
