"""Gates as a module of their own, for transformers' `Trainer` and other loops than the project's."""

from __future__ import annotations

from typing import Any

from torch import nn

from mole_diffusion.text.composed import Composed


class GatesModule(nn.Module):
    """A model whose gates alone are trained: what is called is the model, what learns are the gates.

    A `Trainer` forgets the gradients of the module that it is given and of nothing else, so that gates have
    to be inside. There is no balance loss; `train_gates` has one.

    Args:
        composed: model and experts; the model's parameters are frozen, and it stays in evaluation mode.
    """

    def __init__(self, composed: Composed) -> None:
        super().__init__()
        self.config = composed.model.config
        self.model: Any = composed.model.requires_grad_(False)
        self.gates = nn.ModuleDict({part: mixture.gates for part, mixture in composed.mixtures.items()})

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **more: Any
    ) -> Any:
        """What the model returns; a `Trainer` keeps the columns that are named here."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **more)

    def train(self, mode: bool = True) -> GatesModule:
        """Switch the gates; the model stays in evaluation mode, so that nothing is dropped at random."""
        super().train(mode)
        self.model.eval()
        return self
