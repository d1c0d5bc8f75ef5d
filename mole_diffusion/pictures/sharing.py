"""Shared gates of a pipeline: trained once for its base, for whatever experts are loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole_diffusion.core.holding import HoldsExperts
from mole_diffusion.core.shared_gates import SharedGates

if TYPE_CHECKING:
    from mole_diffusion.pictures.training import Concept, TrainingConfig
    from mole_diffusion.pictures.training.shared_trainer import SharedResult


class SharesGates(HoldsExperts):
    """What refines `mixture="auto"` in a pipeline."""

    @property
    def shared_gates(self) -> SharedGates | None:
        """What `mixture="auto"` is refined by; None for nothing."""
        return self.ensemble.shared

    def load_shared_gates(self, path: str | Path) -> dict[str, str]:
        """Refine `mixture="auto"` by shared gates from now on, for the loaded experts and those to come.

        Args:
            path: a file of `train_shared_gates` or `mole train-shared`.

        Returns:
            The file's metadata.

        Raises:
            GateMismatchError: no such file, it is something else, or it is for another base; everything is as
                it was.
        """
        shared = SharedGates.load(path)
        self.ensemble.take_shared(shared)
        return dict(shared.metadata)

    def unload_shared_gates(self) -> None:
        """Draw with plain `mixture="auto"` again."""
        self.ensemble.shared = None

    def train_shared_gates(
        self,
        prompts: str | Sequence[str],
        concepts: Mapping[str, Concept | Mapping[str, Any] | str] | Sequence[Concept] | None = None,
        config: TrainingConfig | None = None,
        callback: Callable[..., Any] | None = None,
        checkpoint_dir: str | Path | None = None,
    ) -> SharedResult:
        """Train shared gates on the loaded experts; `mixture="auto"` has them afterwards.

        Arguments and result: see `mole_diffusion.pictures.training.shared_trainer.SharedGatesTrainer`.

        Raises:
            NoExpertsError: no experts are loaded.
        """
        self.need_experts("train_shared_gates")
        from mole_diffusion.pictures.training.shared_trainer import SharedGatesTrainer

        result = SharedGatesTrainer(
            self, prompts, concepts, config, callback=callback, checkpoint_dir=checkpoint_dir
        ).train()
        self.ensemble.shared = result.shared
        return result
