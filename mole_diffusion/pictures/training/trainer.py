"""The gate trainer: everything is frozen but the gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL.Image import Image

from mole_diffusion.core.ensemble import Ensemble
from mole_diffusion.core.errors import NoExpertsError, TrainingError
from mole_diffusion.core.experts import Expert
from mole_diffusion.core.files import replacing
from mole_diffusion.core.mixture import Mixture
from mole_diffusion.core.networks.base import DENOISER
from mole_diffusion.core.phrases import STYLE
from mole_diffusion.pictures.denoiser import Denoiser
from mole_diffusion.pictures.denoisers import denoiser_of
from mole_diffusion.pictures.training.concepts import (
    Concept,
    TrainingPrompt,
    as_concepts,
    concepts_from_experts,
    read_prompts,
)
from mole_diffusion.pictures.training.config import TrainingConfig
from mole_diffusion.pictures.training.objectives import PictureObjective
from mole_diffusion.pictures.training.workbench import Composing, tensor_picture
from mole_diffusion.training.gates import Balanced, Gates
from mole_diffusion.training.loop import TrainingLoop
from mole_diffusion.training.progress import HistoryRow, TrainingEvent
from mole_diffusion.training.state import GATES_FILE, Preparation


@dataclass(frozen=True)
class TrainingResult:
    """What a training did.

    Args:
        history: A row per iteration: iteration (from 1), loss, parts, balance, entropy, weights, seconds.
        gates: The gates file, where the trainer has a folder.
        stopped: Whether it was asked to stop before its last iteration.
        passes: UNet passes with and without gradient, and pictures decoded for CLIP.
    """

    history: list[HistoryRow]
    gates: Path | None
    stopped: bool
    passes: dict[str, int]


class WithExperts(Protocol):
    """What experts are attached to, as far as the trainer needs to know it."""

    @property
    def ensemble(self) -> Ensemble:
        """What carries experts and gates."""

    @property
    def experts(self) -> Mapping[str, Expert]:
        """The experts by name, all of which train together."""

    @property
    def mixtures(self) -> Mapping[str, Mixture]:
        """The mixture of each network that experts change, by part."""

    @property
    def composing(self) -> Composing:
        """Chooses which of the experts count."""

    def save_gates(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write the gates into a file."""


class GateTrainer:
    """Trains the gates of a pipeline for prompts that name several concepts.

    Networks and experts stay bitwise as they are; only the parameters of the gates change.

    Args:
        pipe: A `StableDiffusionMoLEPipeline` with its experts loaded; or anything else that is
            `WithExperts`, with its `denoiser`.
        prompts: One or several prompts. Class words are replaced by the trigger phrases where triggers are
            missing.
        concepts: What each expert knows: `Concept` objects, or a mapping from expert name to a Concept, to a
            dictionary of its fields or to its phrase. None takes the triggers from the experts' files.
        config: The settings; None is `TrainingConfig()`.
        callback: Called with a `TrainingEvent` after every iteration; `False` ends the training, which keeps
            what it has.
        checkpoint_dir: Folder for checkpoints, gates, history and previews; None keeps everything in memory.
        denoiser: What draws with these experts; None makes one of the pipeline.
        preparing: Called with (batches of pictures that are drawn, in all) before the first iteration.

    Attributes:
        config: The settings.
        concepts: What each expert knows, by name.
        prompts: The prompts as they are trained.
        objective: The objective, with everything it works with.

    Raises:
        NoExpertsError: if the pipeline has no experts.
        ConfigError: if prompts and concepts do not fit together.
        TrainingError: if the pipeline's scheduler cannot be trained with, or there is one expert alone.
    """

    def __init__(
        self,
        pipe: WithExperts,
        prompts: str | Sequence[str],
        concepts: Mapping[str, Concept | Mapping[str, Any] | str] | Sequence[Concept] | None = None,
        config: TrainingConfig | None = None,
        *,
        callback: Callable[[TrainingEvent], Any] | None = None,
        checkpoint_dir: str | Path | None = None,
        denoiser: Denoiser | None = None,
        preparing: Callable[[int, int], None] | None = None,
    ) -> None:
        if not pipe.mixtures:
            raise NoExpertsError(
                "train_gates: no experts are loaded, and gates belong to experts: call load_expert() first"
            )
        if len(pipe.experts) == 1:
            raise TrainingError(
                f"train_gates: {next(iter(pipe.experts))!r} is the only expert and needs no gates;"
                " load two or more"
            )
        self.config = (config or TrainingConfig()).as_drawn_by(pipe)
        if concepts is None:
            concepts = concepts_from_experts(pipe.experts)
        self.concepts = as_concepts(concepts, list(pipe.experts))
        self.prompts = read_prompts(prompts, self.concepts)
        if denoiser is None:
            denoiser = denoiser_of(pipe, self.config.pictures.size)
        self._pipe = pipe
        self._callback = callback
        self._folder = Path(checkpoint_dir) if checkpoint_dir is not None else None
        self._preparation = Preparation(self._folder, self._facts(), preparing)
        self.objective = PictureObjective(
            denoiser, pipe.composing, self.prompts, self.concepts, self.config, self._preparation
        )
        self._loop: TrainingLoop | None = None

    def stop(self) -> None:
        """End the training after the running iteration; may be called from another thread."""
        if self._loop is not None:
            self._loop.stop()

    def train(self, resume: bool | None = None) -> TrainingResult:
        """Train, or go on with a training.

        Args:
            resume: True goes on from the checkpoint in `checkpoint_dir`, False begins anew; None goes on
                where there is a checkpoint of the same training.

        Raises:
            TrainingError: if `resume` is True and there is no checkpoint of the same training, the checkpoint
                cannot be read, or a loss is no number.
            WriteError: nothing can be written into `checkpoint_dir`.
            KeyboardInterrupt: after Ctrl-C; the checkpoint holds everything up to there.
        """
        self._pipe.ensemble.say_styles(one.name for one in self.concepts.values() if one.kind == STYLE)
        gates = Gates(self._pipe.mixtures, self.config, trained_parts(self._pipe.mixtures, self.config))
        self._loop = TrainingLoop(
            Balanced(self.objective, gates),
            gates,
            self.config,
            facts=self._facts(),
            folder=self._folder,
            callback=self._callback,
            preview=self._preview,
            save=self._save_gates,
            what="gates",
            preparation=self._preparation,
        )
        with (
            self.objective.ready(gates.parameters()),
            gates.others_resting(),
            self._pipe.composing(),
        ):
            done = self._loop.run(resume)
        file = self._folder / GATES_FILE if self._folder else None
        return TrainingResult(done.history, file, done.stopped, self.objective.bench.counter.state_dict())

    def _save_gates(self, iterations: int) -> None:
        if self._folder is not None:
            metadata = {"training": self.config.to_json(), "iterations": str(iterations)}
            self._pipe.save_gates(self._folder / GATES_FILE, metadata=metadata)

    def _preview(self, iteration: int) -> Image:
        """A picture of the first prompt with the gates as they are, always of the same noise."""
        draws = torch.Generator().manual_seed(self.config.seed)
        picture = tensor_picture(self.objective.bench.draw([self.prompts[0].text], draws)[0])
        if self._folder is not None:
            path = self._folder / "previews" / f"{iteration:05d}.png"
            with replacing(path) as temporary:
                picture.save(temporary, format="PNG")
        return picture

    def _facts(self) -> dict[str, Any]:
        """What makes this training this training; equal facts and a checkpoint go on to equal gates."""
        return {
            **self.config.facts(),
            **facts_of(self.prompts, self.concepts, self._pipe.experts),
            "gates": {part: mixture.config.to_json() for part, mixture in self._pipe.mixtures.items()},
        }


def facts_of(
    prompts: Sequence[TrainingPrompt], concepts: Mapping[str, Concept], experts: Mapping[str, Expert]
) -> dict[str, Any]:
    """What a training is of, whatever is trained."""
    return {
        "prompts": [prompt.text for prompt in prompts],
        "concepts": [[c.name, c.text, c.class_text, c.kind, len(c.references)] for c in concepts.values()],
        "experts": [[name, expert.sha256, expert.scale] for name, expert in experts.items()],
    }


def trained_parts(mixtures: Mapping[str, Mixture], config: TrainingConfig) -> list[str]:
    """The parts whose gates train: the denoiser's, and the text encoders' where wanted or all there is."""
    denoisers = [part for part, mixture in mixtures.items() if mixture.role == DENOISER]
    return list(mixtures) if config.text_encoder_gates or not denoisers else denoisers
