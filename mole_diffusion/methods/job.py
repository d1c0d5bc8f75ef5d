"""One preparation of a method: what it is given, and what it notes of its work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole_diffusion.core import rules
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.pictures.files import pictures_digest

if TYPE_CHECKING:
    from PIL.Image import Image

    from mole_diffusion.pictures.training import Concept, TrainingConfig


@dataclass(frozen=True, kw_only=True)
class ConceptRecipe:
    """How a method trains one concept.

    Attributes:
        steps: steps of the optimiser (Adam, cosine schedule).
        rate: learning rate.
        batch: pictures of the concept in each step.
        prior: pictures of the class, drawn by the base, in each step; 0 for none.
        seed: seed of everything that is drawn.
    """

    steps: int
    rate: float
    batch: int = 8
    prior: int = 4
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What single methods can be told.

    Args:
        weights: weight per expert of the PEFT merges; None is 1 each.
        density: share of the values that "ties" and "dare_linear" keep, above 0 and at most 1; None is 0.2
            for "ties" and 0.7 for "dare_linear", as in PEFT's guide to merging.
        search_passes: UNet passes that the search may spend, those that draw pictures not counted; None is as
            many as the trainer has iterations, which is what gates cost with the collage objective.
        steps, rate: steps and learning rate of the methods that train concepts from pictures (SVDiff,
            Textual Inversion, Custom Diffusion); None is the method's own.
        pictures: their pictures of each concept with captions. None is the concept's references, captioned
            with its text; for experts of the starter in a checkout of the repository it is the scenes that
            these experts were trained on.
        cache: folder where trained concepts are kept, for other sets with the same concept; None is the
            user's cache folder (`~/.cache/mole_diffusion/concepts`).

    Raises:
        ConfigError: a value is out of range.
    """

    weights: Mapping[str, float] | None = None
    density: float | None = None
    search_passes: int | None = None
    steps: int | None = None
    rate: float | None = None
    pictures: Mapping[str, Sequence[tuple[Image, str]]] | None = None
    cache: str | Path | None = None

    def __post_init__(self) -> None:
        for name, weight in (self.weights or {}).items():
            if not math.isfinite(weight):
                raise ConfigError(f"weights gives {name!r} {weight!r}; allowed are finite numbers")
        rules.number(0, 1, above=True).check("density", self.density)
        rules.whole().check("search_passes", self.search_passes)
        rules.whole().check("steps", self.steps)
        rules.number(0, math.inf, above=True).check("rate", self.rate)


@dataclass
class Job:
    """One preparation.

    Attributes:
        pipe: the pipeline with its experts; as it was when the job is done.
        folder: where to write.
        prompts: the prompts.
        concepts: what the experts know, by name.
        config: settings of the gate trainer.
        options: settings of single methods.
        passes: UNet passes so far.
        earlier_seconds: how long it took to train what comes from a cache.
        details: what to note of the result.
    """

    pipe: Any
    folder: Path
    prompts: list[str]
    concepts: Mapping[str, Concept]
    config: TrainingConfig
    options: PrepareOptions
    passes: dict[str, int] = field(default_factory=lambda: {"with_gradient": 0, "without_gradient": 0})
    earlier_seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)

    def recipe(self, default: ConceptRecipe) -> ConceptRecipe:
        """How a concept is trained: a method's own recipe with what the options and the seed change."""
        steps = self.options.steps or default.steps
        return replace(default, steps=steps, rate=self.options.rate or default.rate, seed=self.config.seed)

    def captioned(self, concept: Concept) -> list[tuple[Image, str]]:
        """Pictures of a concept with captions."""
        given = (self.options.pictures or {}).get(concept.name)
        if given is None:
            given = _starter_scenes(self.pipe, concept)
        return list(given) if given else [(picture, concept.text) for picture in concept.references]

    def digest(self, concept: Concept) -> str:
        """A hash of the pictures of a concept and their captions."""
        pairs = self.captioned(concept)
        return pictures_digest([picture for picture, _ in pairs], [text for _, text in pairs])


def _starter_scenes(pipe: Any, concept: Concept) -> list[tuple[Image, str]] | None:
    """The scenes that an expert of the starter was trained on; None for other experts, or without artwork."""
    from mole_diffusion.starter.location import BASE_NAMES
    from mole_diffusion.starter.scenes import expert_scenes

    expert = pipe.experts.get(concept.name)
    if expert is None or expert.metadata.get("mole.base") not in BASE_NAMES.values():
        return None
    return expert_scenes(concept.name)
