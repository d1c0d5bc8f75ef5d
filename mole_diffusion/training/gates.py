"""Gates as what the loop trains: their parameters, their balance, and what the history says of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mole_diffusion.core.errors import TrainingError
from mole_diffusion.core.functional import entropy
from mole_diffusion.core.mixture import Mixture
from mole_diffusion.training.losses import balance_of, mean_per_gate
from mole_diffusion.training.objective import Losses, LossTerms, Objective
from mole_diffusion.training.settings import GateSettings


class Gates:
    """The gates of one or several mixtures; a `Learner`.

    Args:
        mixtures: by part; all are kept in checkpoints.
        settings: learning rates and kind of balance.
        trained: parts whose gates train; the others rest. None is all.
    """

    def __init__(
        self,
        mixtures: Mapping[str, Mixture],
        settings: GateSettings,
        trained: Collection[str] | None = None,
    ) -> None:
        self.mixtures = dict(mixtures)
        self.trained = {
            part: mixture for part, mixture in mixtures.items() if trained is None or part in trained
        }
        self.settings = settings

    def optimiser(self) -> torch.optim.Optimizer:
        """Adam with a learning rate for projections and one for scalars (strength, temperature).

        Raises:
            TrainingError: if no gate has anything to train, or one is not float32.
        """
        groups: dict[float, list[nn.Parameter]] = {}
        for part, mixture in self.trained.items():
            for name, parameter in mixture.gates.named_parameters():
                if not parameter.requires_grad:
                    continue
                if parameter.dtype != torch.float32:
                    raise TrainingError(
                        f"gate {part}.{name} is {parameter.dtype}; gates are trained in torch.float32"
                    )
                groups.setdefault(self._rate(mixture, parameter), []).append(parameter)
        if not groups:
            raise TrainingError(f"no gate of {list(self.trained)} has a parameter to train")
        return torch.optim.Adam([{"params": own, "lr": rate} for rate, own in groups.items()])

    def _rate(self, mixture: Mixture, parameter: nn.Parameter) -> float:
        if parameter.numel() == 1:
            return self.settings.scalar_lr
        return self.settings.flatten_lr if mixture.config.pooling == "flatten" else self.settings.gate_lr

    def parameters(self) -> list[nn.Parameter]:
        """What trains."""
        return [
            parameter
            for mixture in self.trained.values()
            for parameter in mixture.gates.parameters()
            if parameter.requires_grad
        ]

    @contextmanager
    def others_resting(self) -> Iterator[None]:
        """Ask no gradient of gates that do not train, inside the `with` block."""
        resting = [
            p for part, own in self.mixtures.items() if part not in self.trained for p in own.parameters()
        ]
        flags = [parameter.requires_grad for parameter in resting]
        for parameter in resting:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, flag in zip(resting, flags, strict=True):
                parameter.requires_grad_(flag)

    def balance(self) -> Tensor:
        """The balance loss of the last forward, 0 where all experts are used as the gates began."""
        prior = next(iter(self.trained.values())).prior
        return balance_of(self._live_weights(), self.settings.balance, prior)

    def row(self, parts: Mapping[str, float]) -> dict[str, Any]:
        """Parts, balance, mean entropy in nats, and mean weight of every expert, of the last forward."""
        live = [gate.detach() for gate in self._live_weights()]
        names = next(iter(self.trained.values())).expert_names
        weights = mean_per_gate(live).mean(dim=0).tolist()
        return {
            "parts": {name: value for name, value in parts.items() if name != "balance"},
            "balance": parts["balance"],
            "entropy": float(torch.stack([entropy(gate) for gate in live]).mean()),
            "weights": dict(zip(names, weights, strict=True)),
        }

    def state_dict(self) -> dict[str, Any]:
        """The gates of every part, those that rest too."""
        return {part: mixture.gates.state_dict() for part, mixture in self.mixtures.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the gates of every part."""
        for part, mixture in self.mixtures.items():
            mixture.gates.load_state_dict(state[part])

    def _live_weights(self) -> list[Tensor]:
        """Weights (batch, experts) of every trained gate in the last forward, with gradient."""
        return [gate for mixture in self.trained.values() for gate in mixture.live_weights().values()]


class Balanced:
    """An objective with the balance loss of the gates added where an update follows (Eq. 16).

    Args:
        objective: what the gates are trained for.
        gates: the gates.
    """

    def __init__(self, objective: Objective, gates: Gates) -> None:
        self._objective = objective
        self._gates = gates

    def prepare(self) -> None:
        """Prepare the objective."""
        self._objective.prepare()

    def losses(self, iteration: int) -> Losses:
        """The losses of the objective; those with an update have a part "balance"."""
        for terms in self._objective.losses(iteration):
            if terms.update:
                balance = self._gates.balance()
                parts = {**terms.parts, "balance": float(balance.detach())}
                terms = LossTerms(terms.loss + self._gates.settings.alpha * balance, parts)
            yield terms

    def state_dict(self) -> dict[str, Any]:
        """That of the objective."""
        return self._objective.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """That of the objective."""
        self._objective.load_state_dict(state)
