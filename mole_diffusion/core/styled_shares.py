"""`mixture="auto"` where experts of the whole picture (styles) count beside others.

Weighed the same from the first step to the last, whichever of the two is stronger takes the other's away.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def beside_others(everywhere: Tensor, pictures: Sequence[int | None], now: Tensor) -> Tensor | None:
    """(B, 1, N) whether an expert counts in the whole of a row's picture, where others have places in it.

    Args:
        everywhere: (N,) weights of the experts of the whole picture, 0 for the others.
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


def factors_of(beside: Tensor, factor: float) -> Tensor:
    """(B, 1, N) this factor for those of `beside_others`, 1 for all else."""
    return torch.where(beside, factor, torch.ones((), device=beside.device))
