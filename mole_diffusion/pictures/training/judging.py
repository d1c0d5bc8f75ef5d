"""The objective of gate training as a function of a fixed mixture, for searches without gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mole_diffusion.pictures.denoisers import denoiser_of
from mole_diffusion.pictures.training.concepts import Concept, read_prompts
from mole_diffusion.pictures.training.config import TrainingConfig
from mole_diffusion.pictures.training.objectives import PictureObjective
from mole_diffusion.training.state import load_state, save_state


class ObjectiveScore:
    """Scores mixtures by the objective of a training, on the same pictures, noise and timesteps every time.

    Args:
        pipe: A pipeline with experts.
        prompts: As for `GateTrainer`.
        concepts: What each expert knows, by name.
        config: As for `GateTrainer`, whose objective it is.
        batches: Batches of the objective that are averaged into one loss.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        concepts: Mapping[str, Concept],
        config: TrainingConfig,
        batches: int,
    ) -> None:
        # Every candidate is to see the same collages.
        fixed = {"redraw_every": config.iterations + 1}
        config = TrainingConfig.from_dict({**config.to_dict(), **fixed}).as_drawn_by(pipe)
        self._pipe = pipe
        denoiser = denoiser_of(pipe, config.pictures.size)
        found = read_prompts(prompts, concepts)
        self._objective = PictureObjective(denoiser, pipe.composing, found, concepts, config)
        # Past the last one: "both" has both terms there.
        self._iteration = config.iterations
        self._batches = batches
        self._draws: dict[str, Any] = {}

    @property
    def passes(self) -> int:
        """UNet passes so far, those that drew pictures included."""
        counter = self._objective.bench.counter
        return counter.with_gradient + counter.without_gradient

    @contextmanager
    def ready(self, folder: Path | None = None) -> Iterator[ObjectiveScore]:
        """Have the pictures drawn and the networks as in training inside the `with` block.

        Args:
            folder: Where the pictures are kept for the next time; None keeps nothing.

        Raises:
            TrainingError: the folder holds a state that cannot be read.
        """
        with self._objective.ready(), torch.no_grad():
            saved = load_state(folder, ["objective"]) if folder is not None else None
            if saved is not None:
                self._objective.load_state_dict(saved["objective"])
            else:
                self._objective.prepare()
                if folder is not None:
                    save_state(folder, {"objective": self._objective.state_dict()})
            self._draws = self._objective.bench.draws.state_dict()
            yield self

    @torch.no_grad()
    def loss(self, mixture: Mapping[str, float]) -> float:
        """Mean loss of the batches with these weights, by expert.

        Raises:
            ConfigError: if the mixture is no weight per expert.
        """
        self._objective.bench.draws.load_state_dict(self._draws)
        total = 0.0
        with self._pipe.composing(mixture=dict(mixture)):
            for _ in range(self._batches):
                total += sum(float(terms.loss) for terms in self._objective.losses(self._iteration))
        return total / self._batches
