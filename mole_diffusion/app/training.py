"""Training gates for a session: what the Train tab and the API do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mole_diffusion.app.jobs import Cancelled, Job, Progress
from mole_diffusion.app.session import Session
from mole_diffusion.app.setup import ExpertCard, Gates, Setup
from mole_diffusion.app.stopping import stoppable
from mole_diffusion.app.studio import Studio, Work
from mole_diffusion.app.train_request import TrainRequest
from mole_diffusion.app.trainings import Training
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.phrases import STYLE, class_words, kind_of
from mole_diffusion.pictures.files import open_picture
from mole_diffusion.pictures.training import Concept, GateTrainer
from mole_diffusion.training.progress import TrainingEvent
from mole_diffusion.training.state import PREPARATION_FILE, STATE_FILE


def start_training(
    studio: Studio, session: Session, request: TrainRequest, setup: Setup | None = None
) -> Training:
    """Queue a training of gates for the chosen experts as they are now, or for those of a setup.

    Raises:
        ConfigError: fewer than two experts, or one whose phrase is not known.
        QueueFullError: see `Studio.submit`.
    """
    setup = setup or session.setup()
    if len(setup.cards) < 2:
        raise ConfigError("gates decide between experts: choose at least two")
    for card in setup.cards:
        if not card.text:
            raise ConfigError(f"the file of {card.name!r} names no trigger: write its phrase under Concepts")
    training = Training(setup, request, session.new_path("training", ""), request.iterations)
    _submit(studio, session, training, resume=False)
    session.training = training
    session.note()
    return training


def resume_training(studio: Studio, session: Session) -> Training:
    """Queue the rest of the session's last training, of the experts that it was begun with.

    Raises:
        ConfigError: there is none that was stopped.
        QueueFullError: see `Studio.submit`.
    """
    training = session.training
    if training is None or not can_resume(training):
        raise ConfigError("there is no training to go on with")
    if training.setup.model != session.model:
        raise ConfigError(f"that training was of the base model {training.setup.model!r}: open it first")
    _submit(studio, session, training, resume=True)
    return training


def can_resume(training: Training | None) -> bool:
    """Whether it was stopped before its end, and left something to go on from."""
    return (
        training is not None
        and training.job.finished
        and training.job.state != "done"
        and any((training.folder / name).is_file() for name in (STATE_FILE, PREPARATION_FILE))
    )


def _submit(studio: Studio, session: Session, training: Training, *, resume: bool) -> None:
    left = training.iterations - len(training.history)
    work = Work(_run(studio, session, training, resume=resume), training.setup, units=max(left, 1))
    training.job = studio.submit(session, "train", work)


def _run(studio: Studio, session: Session, training: Training, *, resume: bool) -> Callable[[Job], Path]:
    def work(job: Job) -> Path:
        job.report(0, 0, "Loading the model and its experts")
        request: TrainRequest = training.request
        going_on = True if resume and (training.folder / STATE_FILE).is_file() else None
        with studio.training(training.setup) as pipe:
            trainer = GateTrainer(
                pipe,
                request.prompts,
                [concept_of(card) for card in training.setup.cards],
                request.config(),
                callback=_teller(job, training),
                checkpoint_dir=training.folder,
                preparing=lambda done, total: job.report(done, total, "Drawing pictures to train on, batch"),
            )
            with _stoppable_preparation(pipe, job, training):
                result = trainer.train(resume=going_on)
        assert result.gates is not None
        # A copy: the training's own file changes when it goes on.
        training.gates = Gates.of_file(session.keep_file(result.gates, "gates"))
        session.note()
        if result.stopped:
            raise Cancelled
        session.set_gates(training.setup.cards, training.gates)
        return training.gates.path

    return work


def _teller(job: Job, training: Training) -> Callable[[TrainingEvent], Any]:
    """The trainer's callback: curves, previews, time left, and whether to go on."""

    def tell(event: TrainingEvent) -> bool:
        if len(training.history) < event.iteration:
            training.history.append(dict(event.row))
        if event.preview is not None:
            path = training.folder / "previews" / f"{event.iteration:05d}.png"
            training.previews.append((str(path), f"{event.iteration}"))
        job.tell(Progress(event.iteration, event.iterations, "Iteration", event.seconds_left))
        return not job.asked_to_stop

    return tell


@contextmanager
def _stoppable_preparation(pipe: Any, job: Job, training: Training) -> Iterator[None]:
    """Let Cancel work before the first iteration too, while pictures are drawn; an iteration ends first."""

    def look() -> None:
        if not training.history:
            job.check()

    job.report(0, 0, "Preparing pictures to train on")
    with stoppable(pipe, look):
        yield


def concept_of(card: ExpertCard) -> Concept:
    """What the trainer needs to know of an expert, with its reference pictures."""
    pictures = [open_picture(path) for path in card.references]
    kind = kind_of(card.text, card.kind if card.kind == STYLE else "")
    words = card.class_text or ("" if kind == STYLE else class_words(card.text))
    return Concept(card.name, card.text, words, pictures, kind)


def uniform_entropy(names: Sequence[str]) -> float:
    """Entropy in nats of gates that treat all experts alike."""
    return math.log(max(len(names), 1))
