"""The objective of gate training as a function of a fixed mixture, for searches without gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mole_diffusion.pictures.training.concepts import Concept
from mole_diffusion.pictures.training.config import TrainingConfig
from mole_diffusion.pictures.training.trainer import GateTrainer
from mole_diffusion.training import state as training_state


class Judge:
    """Judges mixtures by the objective of a trainer, on the same pictures, noise and timesteps every time.

    Args:
        pipe, prompts, concepts, config: As for :class:`GateTrainer`, whose objective it is.
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
        config = replace(config, redraw_every=config.iterations + 1)
        self._trainer = GateTrainer(pipe, prompts, concepts, config)
        self._batches = batches
        self._draws: dict[str, Any] = {}
        self._bench = self._trainer._bench

    @property
    def passes(self) -> int:
        """UNet passes so far, those that drew pictures included."""
        return self._bench.counter.with_gradient + self._bench.counter.without_gradient

    @contextmanager
    def ready(self, folder: Path | None = None) -> Iterator[Judge]:
        """Have the pictures drawn and the networks as in training inside the ``with`` block.

        Args:
            folder: Where the pictures are kept for the next time; None keeps nothing.
        """
        pictures, objective = self._trainer._pictures, self._trainer._objective
        bench, frozen = self._bench, self._trainer._frozen()
        with (
            training_state.only_gates_train(frozen, []),
            training_state.full_precision([bench.pipe.vae, bench.decoder]),
            torch.no_grad(),
        ):
            saved = training_state.load_state(folder) if folder is not None else None
            if saved is not None:
                pictures.load_state_dict(saved["pictures"])
                objective.load_state_dict(saved["objective"])
                bench.draws.load_state_dict(saved["draws"])
                bench.counter.load_state_dict(saved["passes"])
            else:
                pictures.prepare(backgrounds=self._trainer.config.needs_backgrounds)
                objective.prepare()
                if folder is not None:
                    training_state.save_state(folder, self._state())
            self._draws = bench.draws.state_dict()
            yield self

    @torch.no_grad()
    def loss(self, mixture: Mapping[str, float]) -> float:
        """Mean loss of the batches with these weights, by expert.

        Raises:
            ConfigError: if the mixture is no weight per expert.
        """
        self._bench.draws.load_state_dict(self._draws)
        iteration = self._trainer.config.iterations  # past the last one: "both" has both terms there
        total = 0.0
        with self._bench.pipe.composing(mixture=dict(mixture)):
            for _ in range(self._batches):
                total += sum(float(terms.loss) for terms in self._trainer._objective.losses(iteration))
        return total / self._batches

    def _state(self) -> dict[str, Any]:
        return {
            "pictures": self._trainer._pictures.state_dict(),
            "objective": self._trainer._objective.state_dict(),
            "draws": self._bench.draws.state_dict(),
            "passes": self._bench.counter.state_dict(),
        }
