"""Settings of gate training on pictures as flat words, which command lines and YAML files have."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from mole_diffusion.core import rules
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.rules import quoted
from mole_diffusion.pictures.training.tasks import Both, Clip, ClipWalk, Collage, Pictures, Task
from mole_diffusion.training.settings import GateSettings, words_of

Objective = Literal["clip", "collage", "both", "released"]

OBJECTIVES: tuple[Objective, ...] = ("clip", "collage", "both", "released")
_ROLLOUTS = ("step", "walk")
#: What flat words belong to.
_KINDS = (Pictures, Collage, Clip, Both)


def known_words() -> set[str]:
    """The flat words of `TrainingConfig`."""
    return {*words_of(GateSettings), *DEFAULTS, "text_encoder_gates", "batch"}


def _words(kind: type) -> dict[str, Any]:
    """Word -> default, of the settings in a class."""
    return {word: getattr(kind, name) for word, name in words_of(kind).items()}


#: Word -> default.
DEFAULTS: dict[str, Any] = {word: default for kind in _KINDS for word, default in _words(kind).items()}
DEFAULTS |= {"objective": "collage", "rollout": "step"}


def objective_of(task: Task) -> str:
    """The word of an objective."""
    if isinstance(task, Both):
        return "both"
    if isinstance(task, Collage):
        return "collage"
    return "clip" if task.formula == "paper" else "released"


def flat(settings: Task | Pictures | None) -> dict[str, Any]:
    """Settings by their words."""
    if settings is None:
        return {}
    found = {word: getattr(settings, name) for word, name in words_of(type(settings)).items()}
    if isinstance(settings, Both):
        found = flat(settings.collage) | flat(settings.clip) | found
    if not isinstance(settings, Pictures):
        found |= {"objective": objective_of(settings)}
    if isinstance(settings, (Clip, ClipWalk)):
        found |= {"rollout": "walk" if isinstance(settings, ClipWalk) else "step"}
    return found


def batch_words(batch: int | None, given: Mapping[str, Any]) -> dict[str, int]:
    """What a number of pictures per iteration means for each objective, as flat words.

    Raises:
        ConfigError: it is no whole number from 1 on.
    """
    if batch is None:
        return {}
    rules.whole().check("batch", batch)
    pool = max(given.get("pool_size", Collage.pool_size), batch)
    return {"batch_size": batch, "collage_batch": batch, "pool_size": pool}


def arguments_of(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a class of settings among flat words."""
    return {name: given[word] for word, name in words_of(kind).items() if word in given}


def task_of(given: Mapping[str, Any], pictures: Pictures) -> Task:
    """The settings of the chosen objective, from flat words; the words of all others are checked too.

    Raises:
        ConfigError: a value is not allowed, or two contradict each other.
    """
    objective, rollout = given.get("objective", "collage"), given.get("rollout", "step")
    for name, value, allowed in (("objective", objective, OBJECTIVES), ("rollout", rollout, _ROLLOUTS)):
        if value not in allowed:
            raise ConfigError(f"{name} is {value!r}; allowed are {quoted(allowed)}")
    collage = Collage(**arguments_of(Collage, given))
    formula: Any = "released" if objective == "released" else "paper"
    clip = Clip(**arguments_of(Clip, given), formula=formula)
    both = Both(collage=collage, **arguments_of(Both, given))
    _check_rollout(clip, pictures)
    if rollout == "walk":
        if objective not in ("clip", "released"):
            raise ConfigError(f"rollout 'walk' needs objective 'clip' or 'released', got {objective!r}")
        if clip.truncated_steps != 1:
            raise ConfigError(
                "rollout 'walk' detaches between steps: "
                f"truncated_steps must be 1, got {clip.truncated_steps}"
            )
        return ClipWalk(**arguments_of(ClipWalk, given), formula=formula)
    if objective == "both":
        return dataclasses.replace(both, clip=clip)
    return collage if objective == "collage" else clip


def _check_rollout(clip: Clip, pictures: Pictures) -> None:
    if clip.truncated_steps > max(1, pictures.sampling_steps // 2):
        raise ConfigError(
            f"truncated_steps is {clip.truncated_steps}; "
            f"allowed is at most half of sampling_steps ({pictures.sampling_steps})"
        )
    if clip.truncated_steps > 1 and pictures.gradient_checkpointing:
        raise ConfigError(
            "gradient_checkpointing recomputes one step of a rollout: "
            f"truncated_steps must be 1, got {clip.truncated_steps}"
        )
