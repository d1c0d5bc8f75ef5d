"""Which mixture gates on texts begin with: all experts equally, or those that know the task.

A gate that begins with all experts equally sees each of them through the disorder of the others, and where
there are eight, of which one is right, it may never find that one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mole_diffusion.text.composed import Composed, MixtureWord
from mole_diffusion.text.examples import Pair

# Weights that are tried are a softmax over the experts' negative losses by themselves, in nats a token, times
# one of these: all equally, and then nearer and nearer to the best alone.
_SHARPNESS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
# What all experts share in any of them: from nothing no gate comes back.
_SHARED = 0.1
# Of the loss with all equally, what the best has to be below: an expert of the task is at a sixth or less.
# Where none is of the task, gates come a little further from all equally (docs/TEXT.md).
_KNOWN = 0.25
_WORST = 1e4
#: Examples at a time.
BATCH = 64


class Measuring(Protocol):
    """The loss on examples; see `training.CrossEntropy`."""

    def mean_loss(self, pairs: Sequence[Pair], size: int) -> float:
        """Mean over these pairs, so many at a time, without gradient."""


def loss_with(composed: Composed, objective: Measuring, pairs: Sequence[Pair], mixture: MixtureWord) -> float:
    """The mean loss on these pairs with such a mixture."""
    with composed.active(mixture=mixture):
        return objective.mean_loss(pairs, BATCH)


def losses_alone(composed: Composed, objective: Measuring, pairs: Sequence[Pair]) -> dict[str, float]:
    """The mean loss on these pairs with each expert by itself."""
    return {name: loss_with(composed, objective, pairs, {name: 1.0}) for name in composed.experts}


def begin(composed: Composed, objective: Measuring, pairs: Sequence[Pair]) -> None:
    """Let gates that nobody has trained begin with what is best on some examples; see `Gate.begin_with`.

    Costs a pass for each expert and a few more. Without examples, and where no expert knows the task, the
    gates stay as they are.

    Args:
        composed: model and experts.
        objective: what is small for good weights.
        pairs: the examples.
    """
    if not pairs or any(mixture.is_trained for mixture in composed.mixtures.values()):
        return
    names = list(composed.experts)
    alone = torch.tensor([*losses_alone(composed, objective, pairs).values()])
    # One that overflows by itself is the worst.
    losses = torch.nan_to_num(alone, nan=_WORST, posinf=_WORST)
    tried = {one: _weights(losses, one) for one in _SHARPNESS}
    found = {
        one: loss_with(composed, objective, pairs, dict(zip(names, weights.tolist(), strict=True)))
        for one, weights in tried.items()
    }
    best = min(found, key=lambda one: found[one] if math.isfinite(found[one]) else math.inf)
    if not found[best] <= _KNOWN * found[0.0]:
        return
    for mixture in composed.mixtures.values():
        order = [names.index(name) for name in mixture.expert_names]
        for group in mixture.groups:
            group.gate.begin_with(tried[best][order])


def begun(composed: Composed) -> Mapping[str, float]:
    """Expert -> its weight in the mixture that the gates began with."""
    mixture = next(iter(composed.mixtures.values()))
    names = mixture.expert_names
    prior = torch.full((len(names),), 1.0 / len(names)) if mixture.prior is None else mixture.prior
    return dict(zip(names, prior.tolist(), strict=True))


def _weights(losses: Tensor, sharpness: float) -> Tensor:
    """(N,) from (N,)."""
    return torch.softmax(-sharpness * losses, dim=0) * (1 - _SHARED) + _SHARED / len(losses)
