"""What was seen of the places of pictures, and which picture each row of a batch shows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class SeenPlaces:
    """What is known of the pictures of a batch.

    Args:
        pictures: P.
        names: N.

    Attributes:
        met: (P, N) for which experts there is a map; on the CPU.
        now: (P, N) which experts the texts name at this timestep, of those that have places; on the CPU.
        styled: (P, N) the same of those that count in the whole picture.
        maps: (P, N, H, W) how much each place looked at the experts' words, summed over forwards.
    """

    def __init__(self, pictures: int, names: int) -> None:
        self.met = torch.zeros(pictures, names, dtype=torch.bool)
        self.now = torch.zeros(pictures, names, dtype=torch.bool)
        self.styled = torch.zeros(pictures, names, dtype=torch.bool)
        self.maps: Tensor | None = None

    def add(self, maps: Tensor, pictures: Sequence[int | None], named: Tensor) -> None:
        """Add what one forward looked at.

        Args:
            maps: (B, N, H, W).
            pictures: whose row is whose, see `pictures_of`.
            named: (B, N) the experts that the prompts name.
        """
        rows = [row for row, picture in enumerate(pictures) if picture is not None and bool(named[row].any())]
        into = torch.zeros(len(self.met), len(rows))
        for column, row in enumerate(rows):
            into[pictures[row], column] = 1.0
        counts = into @ named[rows].float()
        own = maps[rows] * named[rows].to(maps)[..., None, None]
        found = torch.einsum("pr,rnhw->pnhw", into.to(maps), own)
        found = found / counts.clamp_min(1.0).to(maps)[..., None, None]
        if self.maps is None or self.maps.shape != found.shape:
            self.maps, self.met = found, counts > 0
        else:
            self.maps, self.met = self.maps + found, self.met | (counts > 0)

    def styled_in(self, pictures: Sequence[int | None]) -> Tensor:
        """(B, N) the rows of `styled` of each row's picture, see `pictures_of`; any, where nobody knows."""
        anywhere = self.styled.any(0)
        return torch.stack([anywhere if one is None else self.styled[one] for one in pictures])


def pictures_of(prompts: Sequence[bool], count: int) -> list[int | None]:
    """Which picture each row of a batch shows; None for a row that may belong to any.

    Args:
        prompts: whether the text of a row is a prompt.
        count: of the pictures; the prompts are theirs, in order.
    """
    if count == 1:
        return [0] * len(prompts)
    theirs = iter(range(count))
    others = [row for row, own in enumerate(prompts) if not own]
    # Their negative prompts, before or behind them or in turns; else nobody knows whose they are.
    paired = dict(zip(others, range(count), strict=True)) if len(others) == count else {}
    return [next(theirs, None) if own else paired.get(row) for row, own in enumerate(prompts)]
