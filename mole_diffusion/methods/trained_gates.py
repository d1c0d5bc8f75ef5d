"""Trained gates as one method among the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.mixture_set import MixtureSet
from mole_diffusion.methods.prepared import Prepared, standing
from mole_diffusion.pictures.choosing import Request

if TYPE_CHECKING:
    from mole_diffusion.methods.job import Job

GATES_FILE = "gates.safetensors"


def train(method: str, job: Job) -> None:
    """Train fresh gates of the pipeline's configuration; the pipeline's own gates stay as they are.

    Raises:
        ConfigError: there are no prompts.
        TrainingError: the training was stopped before its end.
    """
    if not job.prompts:
        raise ConfigError("gates are trained for prompts, and none is given")
    ensemble = job.pipe.ensemble
    with ensemble.standing_in(ensemble.build(ensemble.experts.values())):
        result = job.pipe.train_gates(
            job.prompts, concepts=job.concepts, config=job.config, checkpoint_dir=job.folder
        )
    job.passes.update({name: result.passes[name] for name in job.passes})
    job.details["iterations"] = len(result.history)
    job.details["loss"] = result.history[-1]["loss"]


class PreparedGates(Prepared):
    """Gates in `gates.safetensors`, used in place of the pipeline's own."""

    _gated: MixtureSet | None = None

    @contextmanager
    def _engaged(self, pipe: Any, request: Request) -> Iterator[None]:
        ensemble = pipe.ensemble
        self._gated = standing(pipe, self._gated, lambda: ensemble.build_gated(self.folder / GATES_FILE))
        with ensemble.standing_in(self._gated), pipe.composing(mixture="gates", **request.arguments()):
            yield
