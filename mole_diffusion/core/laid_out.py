"""`mixture="auto"`: whose the places of the pictures of a batch are, in one forward of a denoiser."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import functional
from .regions import RegionMasks


@dataclass(frozen=True, eq=False)
class LaidOut:
    """Places, ready for the layers, which have their own sizes.

    Args:
        own: (R, N, H, W) weights of the experts.
        claims: (R, 1, H', W') how far a place is some expert's.
        order: (B,) which of the R each row has.
        regions: where experts count; None for everywhere.
    """

    own: Tensor
    claims: Tensor
    order: Tensor
    regions: RegionMasks | None

    def weights(self, height: int, width: int) -> Tensor:
        """(B, height * width, N) of the experts."""
        own = on_grid(self.own, height, width)
        if self.regions is not None:
            masks = self.regions.on_grid(height, width, own.device)
            own = functional.region_weights(own, masks) * own.sum(-1, keepdim=True)
        return own.index_select(0, self.order)

    def mean(self) -> Tensor:
        """(B, 1, N) of the whole picture."""
        size = (1, 1) if self.regions is not None else self.own.shape[-2:]
        return self.weights(int(size[0]), int(size[1])).mean(1, keepdim=True)

    def claimed(self, height: int, width: int) -> Tensor:
        """(B, height * width, 1) how far a place is some expert's."""
        if self.regions is not None:
            own = self.weights(height, width)
            return (own != 0).any(-1, keepdim=True).to(own)
        return on_grid(self.claims, height, width).index_select(0, self.order)


def lengthened(found: Tensor, tokens: int) -> Tensor:
    """(B, tokens, N) from (B, T, N): tokens of other pictures behind these have the mean."""
    if found.shape[1] == tokens:
        return found
    rest = found.mean(1, keepdim=True).expand(-1, tokens - found.shape[1], -1)
    return torch.cat([found, rest], dim=1)


def on_grid(maps: Tensor, height: int, width: int) -> Tensor:
    """(B, height * width, N) of maps (B, N, H, W)."""
    sized = F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=False)
    return sized.flatten(2).transpose(1, 2)
