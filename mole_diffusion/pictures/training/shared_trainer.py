"""The trainer of shared gates: everything is frozen, the gates of the experts too."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mole_diffusion.core.errors import ConfigError, NoExpertsError, TrainingError
from mole_diffusion.core.phrases import STYLE, names_phrase
from mole_diffusion.core.shared_gates import SharedGates
from mole_diffusion.pictures.auto import AutoMixture
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
from mole_diffusion.pictures.training.shared_collages import SharedCollages
from mole_diffusion.pictures.training.trainer import facts_of
from mole_diffusion.training.loop import TrainingLoop
from mole_diffusion.training.objective import Parameters
from mole_diffusion.training.progress import HistoryRow, TrainingEvent
from mole_diffusion.training.state import Preparation

SHARED_FILE = "shared.safetensors"
#: Where the defaults differ from those of `TrainingConfig`.
DEFAULTS: Mapping[str, Any] = {"iterations": 500, "gate_lr": 3e-3, "pool_size": 384}
#: Settings of `TrainingConfig` that say nothing here.
IDLE = ("alpha", "balance", "flatten_lr", "scalar_lr", "text_encoder_gates")
_DECAY = 1e-3


@dataclass(frozen=True)
class SharedResult:
    """What a training did.

    Args:
        shared: The trained shared gates.
        history: A row per iteration: iteration (from 1), loss, parts, seconds.
        file: Where they are written, where the trainer has a folder.
        stopped: Whether it was asked to stop before its last iteration.
    """

    shared: SharedGates
    history: list[HistoryRow]
    file: Path | None
    stopped: bool


def shared_config(**words: Any) -> TrainingConfig:
    """Settings for shared gates, see `DEFAULTS`; a pool is no smaller than a batch.

    Raises:
        ConfigError: a value is out of range.
    """
    return TrainingConfig(**{**DEFAULTS, **words})


def joined_prompts(
    concepts: Mapping[str, Concept], count: int, scenes: Sequence[str] = (), objects: int = 3, seed: int = 0
) -> list[str]:
    """Prompts that name subjects together at random: "a zorin boot, a fenna cat and a kipra clock at night".

    Args:
        concepts: of the experts; those that are no subjects are left out.
        count: of prompts.
        scenes: what may stand behind; none for nothing.
        objects: how many subjects each prompt names.
        seed: of the choice.

    Raises:
        ConfigError: there are fewer than two subjects.
    """
    texts = [one.text for one in concepts.values() if one.kind != STYLE]
    if len(texts) < 2:
        raise ConfigError(
            f"shared gates are trained on two subjects or more together, and there are {len(texts)}"
        )
    choose = random.Random(seed)
    prompts = []
    for _ in range(count):
        *first, last = choose.sample(texts, min(objects, len(texts)))
        prompts.append(f"{', '.join(first)} and {last}" + (f" {choose.choice(scenes)}" if scenes else ""))
    return prompts


class SharedGatesTrainer:
    """Trains shared gates of a pipeline's base on its experts, for experts to come.

    Args:
        pipe: A pipeline with experts loaded; the more, the less they are all the net knows.
        prompts: Prompts that name some of them together, see `joined_prompts`.
        concepts: What each expert knows, see `GateTrainer`.
        config: The settings; None is `shared_config()`. Only collages teach shared gates.
        callback: Called with a `TrainingEvent` after every iteration; `False` ends the training.
        checkpoint_dir: Folder for checkpoints, history and the file; None keeps everything in memory.
        preparing: Called with (batches of pictures that are drawn, in all) before the first iteration.

    Raises:
        NoExpertsError: if the pipeline has no experts.
        ConfigError: if prompts and concepts do not fit together, or a setting says nothing here.
        TrainingError: if the pipeline's scheduler cannot be trained with, or there is one expert alone.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: str | Sequence[str],
        concepts: Mapping[str, Concept | Mapping[str, Any] | str] | Sequence[Concept] | None = None,
        config: TrainingConfig | None = None,
        *,
        callback: Callable[[TrainingEvent], Any] | None = None,
        checkpoint_dir: str | Path | None = None,
        preparing: Callable[[int, int], None] | None = None,
    ) -> None:
        if not pipe.mixtures:
            raise NoExpertsError("train_shared_gates: no experts are loaded: call load_expert() first")
        if len(pipe.experts) == 1:
            raise TrainingError(
                f"train_shared_gates: {next(iter(pipe.experts))!r} is the only expert; load two or more"
            )
        self.config = _checked(config or shared_config()).as_drawn_by(pipe)
        self.concepts = as_concepts(
            concepts_from_experts(pipe.experts) if concepts is None else concepts, list(pipe.experts)
        )
        self.prompts = _teaching(read_prompts(prompts, self.concepts))
        self.shared = SharedGates.fresh(pipe.mixtures, self.config.seed)
        self._pipe, self._callback = pipe, callback
        self._folder = Path(checkpoint_dir) if checkpoint_dir is not None else None
        self._preparation = Preparation(self._folder, self._facts(), preparing)
        # Where the files do not say what prompts are to say.
        phrases = {
            name: concept.text
            for name, concept in self.concepts.items()
            if not any(names_phrase(concept.text, own) for own in pipe.experts[name].triggers)
        }
        collages = partial(SharedCollages, mixture=AutoMixture(phrases=phrases, shared=self.shared))
        self.objective = PictureObjective(
            denoiser_of(pipe, self.config.pictures.size),
            pipe.composing,
            self.prompts,
            self.concepts,
            self.config,
            self._preparation,
            collages,
        )

    def train(self, resume: bool | None = None) -> SharedResult:
        """Train, or go on with a training; see `GateTrainer.train`.

        Raises:
            TrainingError: there is no checkpoint to resume from, it cannot be read, or a loss is no number.
            WriteError: nothing can be written into `checkpoint_dir`.
        """
        shared, rate = self.shared, self.config.gate_lr
        shared.to(self.objective.bench.device)
        loop = TrainingLoop(
            self.objective,
            Parameters(
                dict(shared.named_parameters()),
                lambda tensors: torch.optim.AdamW(tensors, lr=rate, weight_decay=_DECAY),
            ),
            self.config,
            facts=self._facts(),
            folder=self._folder,
            callback=self._callback,
            save=self._save,
            what="shared gates",
            preparation=self._preparation,
        )
        with self.objective.ready(shared.parameters()):
            done = loop.run(resume)
        shared.metadata = self._metadata(len(done.history))
        file = self._folder / SHARED_FILE if self._folder else None
        return SharedResult(shared.requires_grad_(False), done.history, file, done.stopped)

    def _save(self, iterations: int) -> None:
        if self._folder is not None:
            self.shared.save(self._folder / SHARED_FILE, self._metadata(iterations))

    def _metadata(self, iterations: int) -> dict[str, str]:
        return {
            "training": self.config.to_json(),
            "iterations": str(iterations),
            "trained_on": json.dumps(list(self._pipe.experts)),
        }

    def _facts(self) -> dict[str, Any]:
        """What makes this training this training."""
        facts = self.config.facts()
        return {
            **{name: value for name, value in facts.items() if name not in IDLE},
            **facts_of(self.prompts, self.concepts, self._pipe.experts),
            "shared": self.shared.parts,
        }


def _teaching(prompts: Sequence[TrainingPrompt]) -> Sequence[TrainingPrompt]:
    """Refuse prompts in whose pictures shared gates do not act, see `Auto.refining`.

    Raises:
        ConfigError: there is one.
    """
    for prompt in prompts:
        if prompt.styles:
            raise ConfigError(
                f"shared gates learn how subjects share a picture, and {prompt.text!r} names the style "
                f"{prompt.styles[0]!r}, beside which they do not act"
            )
        if len(prompt.order) < 2:
            raise ConfigError(
                f"shared gates learn how subjects share a picture, and {prompt.text!r} names one alone"
            )
    return prompts


def _checked(config: TrainingConfig) -> TrainingConfig:
    """Refuse settings that nobody would read.

    Raises:
        ConfigError: there is one.
    """
    if config.objective != "collage":
        raise ConfigError(f"objective is {config.objective!r}; shared gates are trained on collages alone")
    usual, given = TrainingConfig().to_dict(), config.to_dict()
    if changed := [name for name in IDLE if given[name] != usual[name]]:
        raise ConfigError(f"{', '.join(changed)} say nothing where shared gates are trained")
    return config
