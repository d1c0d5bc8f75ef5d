"""`mixture="auto"` where experts of the whole picture (styles) count beside others.

Weighed the same from the first step to the last, whichever of the two is stronger takes the other's away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .auto import AutoSettings


def beside_others(everywhere: Tensor, pictures: Sequence[int | None], now: Tensor) -> Tensor | None:
    """(B, 1, N) whether an expert counts in the whole of a row's picture, where others have places in it.

    Args:
        everywhere: (B or 1, 1, N) weights of the experts of the whole picture, 0 for the others.
        pictures: which one each row shows; None for any.
        now: (P, N) the experts with places of their own that the texts of each picture name; on the CPU.
    Returns:
        None where there is no such row.
    """
    named = now.any(1)
    if not bool(named.any()):
        return None
    rows = torch.tensor([bool(named.any() if one is None else named[one]) for one in pictures])
    return rows.to(everywhere.device)[:, None, None] & (everywhere != 0)


@dataclass(frozen=True, eq=False)
class StyledShares:
    """What styles count beside others, in one forward.

    Args:
        beside: of `beside_others`.
        settings: how they count.
        timestep: from 1 (noise) to 0.
    """

    beside: Tensor
    settings: AutoSettings
    timestep: float

    def in_words(self, weights: Tensor) -> Tensor:
        """Weights (B, L, N) of text tokens in keys and values of cross-attention."""
        return torch.where(self.beside, weights * self.settings.style_words, weights)

    def in_picture(self, weights: Tensor, claims: Tensor) -> Tensor:
        """Weights (B, T, N) of image tokens.

        Args:
            weights: with those of styles at 1.
            claims: (B, T, 1) how far each place is another expert's.
        """
        free = self.settings.style_at(self.timestep)
        held = free * self.settings.style_inside_at(self.timestep)
        return torch.where(self.beside, weights * (free + claims * (held - free)), weights)
