"""What gates said in the current forward."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import functional

#: Rank weights, and the matrix (slot) they were computed at, by layout of the matrix, data type and, where it
#: matters, number of tokens.
Expanded = dict[tuple[tuple[int, torch.device], torch.dtype, int], tuple[Tensor, object]]


@dataclass(eq=False)
class GateValue:
    """What a gate said in the current forward.

    Attributes:
        rows: (B * T, N) gate weights before strength, scales and regions, one row per token of the batch
            where T is L; or (1, N) for all of them.
        batch: B.
        strength: scalar as trained, or (B * T, 1) where the gates set it token by token; None where it does
            not apply (fixed weights, one expert alone).
        in_backward: whether a recomputation inside a backward pass computed it.
        real: (B, T, 1) how much each token counts in means, where there is padding; else None.
        expanded: rank weights.
        joint: the same for a sequence with the text tokens too, and their gate's value.
    """

    rows: Tensor
    batch: int
    strength: Tensor | None
    in_backward: bool
    real: Tensor | None = None
    expanded: Expanded = field(default_factory=dict)
    joint: tuple[GateValue, Expanded] | None = None

    @property
    def tokens(self) -> int:
        """T."""
        return max(self.rows.shape[0] // self.batch, 1)

    @property
    def weights(self) -> Tensor:
        """(B, T, N)."""
        if self.rows.shape[0] == 1:
            return self.rows.unsqueeze(0).expand(self.batch, 1, -1)
        return self.rows.view(self.batch, -1, self.rows.shape[-1])

    def mean(self) -> Tensor:
        """(B, N) weights, mean over the tokens that are no padding."""
        if self.real is None or self.tokens == 1:
            return self.weights.mean(1)
        return functional.mean_tokens(self.weights, self.real).squeeze(1)

    def pooled(self) -> GateValue:
        """The same with the mean weights over the tokens."""
        strength = self.strength
        if strength is not None and strength.dim() > 0:
            strength = strength.view(self.batch, -1, 1)
            strength = functional.mean_tokens(strength, self.real if strength.shape[1] > 1 else None)
            strength = strength.view(self.batch, 1)
        return GateValue(self.mean(), self.batch, strength, self.in_backward)

    def expanded_with(self, text: GateValue) -> Expanded:
        """As `expanded`, of the sequence with text tokens; empty again when their gate says something new."""
        if self.joint is None or self.joint[0] is not text:
            self.joint = text, {}
        return self.joint[1]


@dataclass(eq=False)
class Voice:
    """Where what one gate says is kept until the next forward.

    Each gate has its own: blocks that are compiled one by one and are alike share one graph if they look up
    nothing by name.

    Attributes:
        label: name under which it is recorded.
        value: what it said last; None before it is asked.
        live: the same, of the forward itself and not of a recomputation.
    """

    label: str
    value: GateValue | None = None
    live: GateValue | None = None
