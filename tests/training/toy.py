"""A toy: a tiny torch network with two experts, and numbers to learn. No pictures, no diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mole_diffusion.core.config import MoLEConfig
from mole_diffusion.core.experts import Expert
from mole_diffusion.core.mixture import Mixture, inject
from mole_diffusion.training.gates import Balanced, Gates
from mole_diffusion.training.loop import TrainingLoop
from mole_diffusion.training.objective import Losses, LossTerms
from mole_diffusion.training.settings import GateSettings

WIDTH, TOKENS = 6, 5
MATRICES = [f"encoder.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.v_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + torch.tanh(self.q_proj(x)) * self.v_proj(x)
        return found


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.self_attn(x)
        return found


class Toy(nn.Module):
    """Two layers whose names are those of a text encoder, always of the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(Layer() for _ in range(2))
        draws = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=draws))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.encoder.layers:  # type: ignore[union-attr]
            x = layer(x)
        return x


def experts() -> list[Expert]:
    """A "dog" and a "cat", which change every matrix."""
    made = []
    for seed, name in enumerate(("dog", "cat"), start=2):
        draws = torch.Generator().manual_seed(seed)
        state = {
            f"{matrix}.lora_{side}.weight": 0.4 * torch.randn(shape, generator=draws)
            for matrix in MATRICES
            for side, shape in (("A", (2, WIDTH)), ("B", (WIDTH, 2)))
        }
        made.append(Expert.from_state_dict(state, name=name))
    return made


def toy_mixture() -> Mixture:
    """A toy with both experts and fresh gates."""
    return inject(Toy().requires_grad_(False), experts(), MoLEConfig(pooling="mean"))


class Guessing:
    """Make of random numbers what the network makes of them with the dog alone.

    The numbers lie around one that is not 0, so that what the experts make of them has a direction of its
    own, and gates can tell dog from cat.

    Args:
        mixture: on the toy.
        seed: of the numbers.
        halves: losses per update.
    """

    def __init__(self, mixture: Mixture, seed: int = 0, halves: int = 1) -> None:
        self._mixture, self._halves = mixture, halves
        self._draws = torch.Generator().manual_seed(seed)
        self._scale = 0.0
        self.closed = 0

    def prepare(self) -> None:
        """What is drawn once belongs into the state."""
        self._scale = float(1 + torch.rand((), generator=self._draws))

    def losses(self, iteration: int) -> Losses:
        """As many losses as there are halves, and an update."""
        try:
            for half in range(1, self._halves + 1):
                x = self._scale + 0.2 * torch.randn(4, TOKENS, WIDTH, generator=self._draws)
                with torch.no_grad():
                    self._mixture.activate(weights={"dog": 1.0})
                    wanted = self._mixture.network(x)
                self._mixture.activate()
                loss = (self._mixture.network(x) - wanted).square().mean() / self._halves
                yield LossTerms(loss, {"guess": float(loss.detach())}, update=half == self._halves)
        finally:
            self.closed += 1

    def state_dict(self) -> dict[str, Any]:
        """The generator and what was drawn once."""
        return {"draws": self._draws.get_state(), "scale": self._scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self._draws.set_state(state["draws"])
        self._scale = state["scale"]


def toy_loop(mixture: Mixture, **options: Any) -> TrainingLoop:
    """The loop over the toy; `options` are its own, and settings under "settings"."""
    values = {"iterations": 8, "gate_lr": 0.1, "alpha": 0.1, "progress": False, **options.pop("settings", {})}
    settings = GateSettings(**values)
    gates = Gates({"toy": mixture}, settings)
    objective = options.pop("objective", None) or Guessing(mixture)
    return TrainingLoop(Balanced(objective, gates), gates, settings, **options)


def values_of(mixture: Mixture) -> dict[str, Tensor]:
    """All numbers of the gates, copied."""
    return {name: value.clone() for name, value in mixture.gates.state_dict().items()}
