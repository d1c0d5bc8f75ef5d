"""Training an expert from pictures: what the Models tab does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image

from mole_diffusion.app.jobs import Job
from mole_diffusion.app.library import add_made
from mole_diffusion.app.session import Session
from mole_diffusion.app.setup import ExpertCard, Setup
from mole_diffusion.app.stopping import stoppable
from mole_diffusion.app.studio import Studio, Work
from mole_diffusion.core import rules
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.phrases import class_words
from mole_diffusion.pictures.files import open_picture
from mole_diffusion.pictures.training.expert_trainer import ExpertTrainer, ExpertTrainingConfig
from mole_diffusion.starter.location import STARTER

MAX_STEPS = 5000
MAX_PICTURES = 40
#: Learning rates that suit the starter, which is small, and the large models.
_RATES = {True: 1e-3, False: 1e-4}


@dataclass(frozen=True, kw_only=True)
class TeachRequest:
    """What to train an expert on.

    Attributes:
        pictures: files that show one subject.
        text: words for it with a trigger: "a sks dog".
        name: the expert's name; empty takes the trigger's.
        steps: optimiser steps.

    Raises:
        ConfigError: something is missing or out of range.
    """

    pictures: tuple[Path, ...]
    text: str
    name: str = ""
    steps: int = 300

    def __post_init__(self) -> None:
        if not 1 <= len(self.pictures) <= MAX_PICTURES:
            raise ConfigError(f"{len(self.pictures)} pictures; an expert is trained on 1 to {MAX_PICTURES}")
        if len(self.text.split()) < 2:
            raise ConfigError('write words for the subject with a trigger of its own, such as "a sks dog"')
        rules.whole(1, MAX_STEPS).check("steps", self.steps)


def teach(studio: Studio, session: Session, request: TeachRequest) -> Work:
    """The work of training a LoRA on pictures (DreamBooth), for `Studio.submit`; its result is the card."""
    session.check_settled()
    model = session.model
    kept = tuple(session.keep_file(path, "references") for path in request.pictures)

    def work(job: Job) -> ExpertCard:
        job.report(0, 0, "Loading the model")
        pipe = studio.base(model)
        class_text = class_words(request.text)
        config = ExpertTrainingConfig(
            steps=request.steps, batch_size=4, learning_rate=_RATES[model == STARTER]
        )
        out = session.new_path("experts", ".safetensors")

        def tell(done: int, total: int, loss: float) -> None:
            job.report(done, total, "Training the expert, step")

        with stoppable(pipe, job.check):
            trainer = ExpertTrainer(pipe, _opened(kept), request.text, class_text, config)
            trainer.train(out, out.with_suffix(""), callback=tell)
        return add_made(session, out, request.name, request.text, class_text, kept)

    return Work(work, Setup(model), units=request.steps)


def _opened(paths: Sequence[Path]) -> list[Image]:
    return [open_picture(path) for path in paths]
