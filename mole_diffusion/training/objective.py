"""What the loop needs to know of what is learned: an objective gives losses, a learner has the parameters."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass
class LossTerms:
    """A loss with gradient, and its parts as numbers for the history.

    The loop runs backward on each loss at once, so that one graph is alive at a time, and takes a step of the
    optimiser where `update` is set; gradients of the others add up until then.
    """

    loss: Tensor
    parts: dict[str, float]
    update: bool = True


#: The losses of one iteration. A generator, so that the loop can close it when an iteration fails: what it
#: holds open around a loss is then left at once.
Losses = Generator[LossTerms, None, None]


class Objective(Protocol):
    """What is to become small."""

    def prepare(self) -> None:
        """Everything that is constant over the iterations, without gradient."""

    def losses(self, iteration: int) -> Losses:
        """The losses of one iteration (from 0); the last one asks for an update."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a checkpoint beside parameters and optimiser, random generators above all.

        Tensors and plain values only: nothing else is read from a checkpoint.
        """

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint, instead of `prepare`."""


class Learner(Protocol):
    """What is trained."""

    def optimiser(self) -> torch.optim.Optimizer:
        """A fresh optimiser that holds exactly what is trained, at its full learning rates."""

    def state_dict(self) -> dict[str, Any]:
        """The parameters, as tensors in dictionaries."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the parameters."""

    def row(self, parts: Mapping[str, float]) -> dict[str, Any]:
        """What the history says of an iteration: the mean parts of its losses under "parts", and more."""


class Parameters:
    """Tensors as a learner.

    Args:
        named: the tensors, by name.
        make: builds the optimiser for them.
    """

    def __init__(
        self, named: Mapping[str, Tensor], make: Callable[[list[Tensor]], torch.optim.Optimizer]
    ) -> None:
        self._named = dict(named)
        self._make = make

    def optimiser(self) -> torch.optim.Optimizer:
        """A fresh optimiser for all of them."""
        return self._make(list(self._named.values()))

    def state_dict(self) -> dict[str, Any]:
        """The tensors by name, on the CPU."""
        return {name: tensor.detach().cpu() for name, tensor in self._named.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the tensors.

        Raises:
            ValueError: names or shapes are others.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in self._named.items()}
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if shapes != found:
            other = sorted(name for name in {*shapes, *found} if shapes.get(name) != found.get(name))
            raise ValueError(f"other tensors than here: {', '.join(other[:3])}")
        for name, tensor in self._named.items():
            tensor.copy_(state[name])

    def row(self, parts: Mapping[str, float]) -> dict[str, Any]:
        """The parts of the losses."""
        return {"parts": dict(parts)}
