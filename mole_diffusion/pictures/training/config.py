"""`TrainingConfig`: all settings of gate training on pictures, by objective or as flat words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.pictures.training.flat_words import (
    DEFAULTS,
    Objective,
    arguments_of,
    batch_words,
    flat,
    known_words,
    objective_of,
    task_of,
)
from mole_diffusion.pictures.training.tasks import Both, Clip, ClipWalk, Collage, Pictures, Task
from mole_diffusion.training.settings import COSMETIC, GateSettings, words_of

# Words that came later, as training was before: what was trained then is the same training now.
_LATER = {"collage_target": "pictures"}


@dataclass(frozen=True, kw_only=True, init=False)
class TrainingConfig(GateSettings):
    """How gates are trained on pictures.

    The defaults are the collage objective, which did best on the starter; `paper` gives the settings of
    "Mixture of LoRA Experts" (Wu et al., 2024).

        TrainingConfig(iterations=200, objective=Collage(batch=4))

    Settings may also be given as flat words, as command lines and YAML files do, and be read as such. A word
    is the name of a field of `Pictures`, `Collage`, `Clip` or `Both`, or what is in brackets behind it there:

        TrainingConfig(iterations=200, objective="collage", collage_batch=4)

    Words of objectives that are not chosen are checked and left aside. `rollout="walk"` is `ClipWalk`.

    Args:
        objective: A `Collage`, `Clip`, `ClipWalk` or `Both`; or a word: `"clip"` (local and global CLIP
            guidance, the paper), `"collage"`, `"both"` (collages first, CLIP on top) or `"released"` (the
            CLIP formula of the authors' code).
        pictures: How pictures are drawn.
        text_encoder_gates: Whether the gates of text encoders are trained; they stay as they are otherwise.
        batch: Pictures per iteration of whatever objective; the pool of collages grows with it. None is the
            objective's own.
        words: Settings of the loop and of gates (`training.settings`), and flat words.

    Raises:
        ConfigError: if a value is out of range or two settings contradict each other.
    """

    task: Task
    pictures: Pictures
    text_encoder_gates: bool

    def __init__(
        self,
        *,
        objective: Objective | Task | str | None = None,
        task: Task | None = None,
        pictures: Pictures | None = None,
        text_encoder_gates: bool = True,
        batch: int | None = None,
        **words: Any,
    ) -> None:
        given = flat(pictures) | flat(task)
        given |= {"objective": objective} if isinstance(objective, str) else flat(objective)
        given |= batch_words(batch, given | words) | words
        loop = {name: given.pop(name) for name in words_of(GateSettings) if name in given}
        if unknown := sorted(set(given) - set(DEFAULTS)):
            raise TypeError(f"TrainingConfig() has no settings {unknown}; it has {sorted(known_words())}")
        super().__init__(**loop)
        if not isinstance(text_encoder_gates, bool):
            raise ConfigError(f"text_encoder_gates is {text_encoder_gates!r}; allowed are True and False")
        object.__setattr__(self, "text_encoder_gates", text_encoder_gates)
        object.__setattr__(self, "pictures", Pictures(**arguments_of(Pictures, given)))
        object.__setattr__(self, "task", task_of(given, self.pictures))

    def __getattr__(self, name: str) -> Any:
        """A setting by its flat word."""
        if name in DEFAULTS:
            return self.to_dict()[name]
        raise AttributeError(f"TrainingConfig has no setting {name!r}")

    @classmethod
    def paper(cls, **changes: Any) -> TrainingConfig:
        """Settings of the paper: CLIP objective, 400 iterations, batch 2, learning rate 1e-5, alpha 0.5."""
        settings: dict[str, Any] = {
            "objective": "clip",
            "iterations": 400,
            "batch_size": 2,
            "alpha": 0.5,
            "gate_lr": 1e-5,
            "flatten_lr": 1e-5,
            "scalar_lr": 1e-5,
            "schedule": "constant",
            "guidance": 7.5,
            "guidance_rescale": 0.0,
            "local_against": "both",
            "contrast_weight": 0.0,
        }
        return cls(**{**settings, **changes})

    def as_drawn_by(self, pipe: Any) -> TrainingConfig:
        """The same with the guidance of a pipeline, see `Pictures.as_drawn_by`."""
        return TrainingConfig.from_dict({**self.to_dict(), **flat(self.pictures.as_drawn_by(pipe))})

    @property
    def objective(self) -> str:
        """The word of the objective."""
        return objective_of(self.task)

    @property
    def collage(self) -> Collage | None:
        """The settings of collages, where any iteration trains on them."""
        if isinstance(self.task, Both):
            return self.task.collage
        return self.task if isinstance(self.task, Collage) else None

    @property
    def clip_guidance(self) -> Clip | ClipWalk | None:
        """The settings of guidance by CLIP, where any iteration asks CLIP."""
        if isinstance(self.task, Both):
            return self.task.clip
        return None if isinstance(self.task, Collage) else self.task

    def to_dict(self) -> dict[str, Any]:
        """All settings by their flat words; those of objectives that are not chosen are the defaults."""
        chosen = flat(self.pictures) | flat(self.task)
        return {
            **{name: getattr(self, name) for name in words_of(GateSettings)},
            "text_encoder_gates": self.text_encoder_gates,
            **DEFAULTS,
            **chosen,
        }

    def facts(self) -> dict[str, Any]:
        """The settings that the trained gates depend on."""
        return {
            name: value
            for name, value in self.to_dict().items()
            if name not in COSMETIC and _LATER.get(name) != value
        }

    def to_json(self) -> str:
        """All settings as one line of JSON."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingConfig:
        """The reverse of `to_dict`; what is not in it has its default.

        Raises:
            ConfigError: if a setting is unknown or a value is not allowed.
        """
        unknown = sorted(set(values) - known_words())
        if unknown:
            raise ConfigError(
                f"unknown fields {unknown} of TrainingConfig; known are {sorted(known_words())}"
            )
        return cls(**values)
