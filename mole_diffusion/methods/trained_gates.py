"""Trained gates as one method among the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mole_diffusion.core.checkpoint import load_gates, read_gates_header
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.methods.prepared import Prepared, Request
from mole_diffusion.methods.stand_in import StandIn

if TYPE_CHECKING:
    from mole_diffusion.methods.preparation import Job

GATES_FILE = "gates.safetensors"


def train(method: str, job: Job) -> None:
    """Train fresh gates of the pipeline's configuration; the pipeline's own gates stay as they are.

    Raises:
        ConfigError: there are no prompts.
        TrainingError: the training was stopped before its end.
    """
    if not job.prompts:
        raise ConfigError("gates are trained for prompts, and none is given")
    fresh = StandIn(dict(job.pipe.experts), job.pipe.mole_config)
    with job.pipe.standing_in(fresh):
        result = job.pipe.train_gates(
            job.prompts, concepts=job.concepts, config=job.config, checkpoint_dir=job.folder
        )
    job.passes.update({name: result.passes[name] for name in job.passes})
    job.details["iterations"] = len(result.history)
    job.details["loss"] = result.history[-1]["loss"]


class PreparedGates(Prepared):
    """Gates in `gates.safetensors`, used in place of the pipeline's own."""

    _stand_in: StandIn | None = None

    @contextmanager
    def _engaged(self, pipe: Any, request: Request) -> Iterator[None]:
        if self._stand_in is None:
            path = self.folder / GATES_FILE
            header = read_gates_header(path)
            config = header.config(next(iter(header.parts)))
            self._stand_in = StandIn(dict(pipe.experts), config, lambda mixtures: load_gates(path, mixtures))
        with pipe.standing_in(self._stand_in), pipe.composing(mixture="gates", **request.arguments()):
            yield
