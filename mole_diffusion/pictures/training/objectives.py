"""The objective of gate training on pictures, put together with everything it works with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mole_diffusion.pictures.denoiser import Denoiser
from mole_diffusion.pictures.training.clip_guidance import ClipGuide
from mole_diffusion.pictures.training.clip_objective import BothObjectives, ClipObjective, ClipWalkObjective
from mole_diffusion.pictures.training.collage_objective import CollageObjective
from mole_diffusion.pictures.training.concepts import Concept, TrainingPrompt
from mole_diffusion.pictures.training.config import TrainingConfig
from mole_diffusion.pictures.training.sources import ConceptPictures
from mole_diffusion.pictures.training.tasks import Both, Clip, ClipWalk, Collage
from mole_diffusion.pictures.training.workbench import Composing, Workbench
from mole_diffusion.training.objective import Losses, Objective
from mole_diffusion.training.state import Preparation, frozen


class PictureObjective:
    """An objective of `TrainingConfig` with its workbench, pictures and guiding CLIP; an `Objective` itself.

    Args:
        denoiser: The model, with experts.
        composing: Chooses which of them count.
        prompts: The training prompts.
        concepts: The concept of each expert.
        config: The settings.
        preparation: Keeps what `prepare` draws.
        collages: Makes the objective of collages.

    Attributes:
        bench: The model, random draws and the pass counter.
        pictures: Pictures of the concepts.
        task: The objective alone.

    Raises:
        TrainingError: the model cannot be trained with, or there is no such guiding CLIP.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        composing: Composing,
        prompts: Sequence[TrainingPrompt],
        concepts: Mapping[str, Concept],
        config: TrainingConfig,
        preparation: Preparation | None = None,
        collages: Callable[..., CollageObjective] = CollageObjective,
    ) -> None:
        self._config = config
        self._collages = collages
        clip = config.clip_guidance
        small = None if clip is None else clip.decoder
        self.bench = Workbench(denoiser, composing, config.pictures, config.seed, small)
        ranking = config.pictures.ranking
        ranker = None if config.pictures.candidates == 1 else _guide(ranking, self.bench.device)
        self.pictures = ConceptPictures(self.bench, prompts, concepts, preparation, ranker)
        self._guide = None if clip is None else _guide(clip.model, self.bench.device)
        self.task: Objective = self._task(config.task)

    @property
    def networks(self) -> list[nn.Module]:
        """Every network that takes part, once."""
        return self.bench.networks + ([] if self._guide is None else [self._guide.model])

    @contextmanager
    def ready(self, training: Iterable[nn.Parameter] = ()) -> Iterator[None]:
        """Have the networks as they must be inside the `with` block: frozen, and precise where they decode.

        Args:
            training: What trains.
        """
        with frozen(self.networks, training), self.bench.training(decodes=self._guide is not None):
            yield

    def prepare(self) -> None:
        """Draw what is missing of pictures, and prepare the objective."""
        collage = self._config.collage
        self.pictures.prepare(backgrounds=collage is not None and collage.needs_backgrounds)
        self.task.prepare()

    def losses(self, iteration: int) -> Losses:
        """The losses of one iteration."""
        return self.task.losses(iteration)

    def state_dict(self) -> dict[str, Any]:
        """Pictures, random generators, passes, and what the objective has to keep."""
        return {
            "draws": self.bench.draws.state_dict(),
            "pictures": self.pictures.state_dict(),
            "task": self.task.state_dict(),
            "passes": self.bench.counter.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.bench.draws.load_state_dict(state["draws"])
        self.pictures.load_state_dict(state["pictures"])
        self.task.load_state_dict(state["task"])
        self.bench.counter.load_state_dict(state["passes"])

    def _task(self, settings: Collage | Clip | ClipWalk | Both) -> Objective:
        bench, pictures, iterations = self.bench, self.pictures, self._config.iterations
        if isinstance(settings, Collage):
            return self._collages(bench, pictures, settings, iterations)
        assert self._guide is not None
        if isinstance(settings, ClipWalk):
            return ClipWalkObjective(bench, pictures, settings, self._guide)
        if isinstance(settings, Clip):
            return ClipObjective(bench, pictures, settings, self._guide)
        return BothObjectives(
            CollageObjective(bench, pictures, settings.collage, iterations),
            ClipObjective(bench, pictures, settings.clip, self._guide),
            first_iteration=settings.start * iterations,
            weight=settings.weight,
        )


def _guide(model: str | tuple[str, str] | None, device: torch.device) -> ClipGuide:
    """A CLIP that guides or ranks; the starter's by default."""
    from mole_diffusion.starter import starter_dir

    return ClipGuide.load(f"local-dir:{starter_dir() / 'clip'}" if model is None else model, device)
