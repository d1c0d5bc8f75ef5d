"""What a training of gates is asked for with."""

from __future__ import annotations

from dataclasses import dataclass

from mole_diffusion.core import rules
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.pictures.training import TrainingConfig
from mole_diffusion.pictures.training.flat_words import OBJECTIVES

PREVIEW_EVERY = 50
MAX_BATCH = 64
MAX_ITERATIONS = 5000
_CHECKPOINT_EVERY = 25


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """How to train.

    Attributes:
        prompts: at least one, naming every expert's subject between them.
        iterations, objective, seed: see `TrainingConfig`.
        batch: pictures per iteration; 0 is the objective's default.
        backgrounds: the base draws backgrounds for the collages first; else they are cut from the references.
        preview_every: iterations between previews.

    Raises:
        ConfigError: something is out of range.
    """

    prompts: tuple[str, ...]
    iterations: int = 400
    objective: str = "collage"
    seed: int = 0
    batch: int = 0
    backgrounds: bool = True
    preview_every: int = PREVIEW_EVERY

    def __post_init__(self) -> None:
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise ConfigError("the prompt is empty: write one that names every expert's subject")
        rules.whole(1, MAX_ITERATIONS).check("iterations", self.iterations)
        rules.whole(1, MAX_BATCH).check("batch", self.batch, absent=0)
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"objective is {self.objective!r}; allowed are {list(OBJECTIVES)}")

    def config(self) -> TrainingConfig:
        """As the trainer takes it."""
        return TrainingConfig(
            objective=self.objective,
            iterations=self.iterations,
            seed=self.seed,
            batch=self.batch or None,
            collage_background="base" if self.backgrounds else "sources",
            preview_every=self.preview_every,
            checkpoint_every=_CHECKPOINT_EVERY,
            progress=False,
        )
