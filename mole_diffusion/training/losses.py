"""Losses on the gates themselves, whatever they are trained for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mole_diffusion.core.functional import balance_loss


def mean_per_gate(weights: Sequence[Tensor]) -> Tensor:
    """Weight of each expert in each gate, averaged over the batch: (gates, experts) from (batch, experts)
    each.

    The networks of a pipeline see batches of different sizes; this way every gate counts once (Eq. 15).
    """
    return torch.stack([gate.float().mean(dim=0) for gate in weights])


def balance_of(weights: Sequence[Tensor], kind: str, prior: Tensor | None = None) -> Tensor:
    """The balance loss of gates, 0 where all experts are used equally, or as in the prior.

    Args:
        weights: (batch, experts) of every gate, with gradient.
        kind: "average" for the weights averaged over all gates, "per_gate" for the mean over single gates.
        prior: (experts,) weights that the gates began with; None for equal ones.
    """
    means = mean_per_gate(weights)
    if kind == "average":
        return balance_loss(means, prior, normalised=True)
    return torch.stack([balance_loss(gate, prior, normalised=True) for gate in means]).mean()
