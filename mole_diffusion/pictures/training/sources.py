"""Pictures of the concepts: references that were given, or pictures each expert draws alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.pictures.training.collage import Cutout, cut_out
from mole_diffusion.pictures.training.concepts import Concept, TrainingPrompt
from mole_diffusion.pictures.training.workbench import Workbench, picture_tensor

#: Pictures drawn in one batch.
_BATCH = 8


class ConceptPictures:
    """Pictures of each concept, and backgrounds; drawn once, kept in the checkpoint.

    Args:
        bench: The shared workbench.
        prompts: The training prompts.
        concepts: The concept of each expert.
    """

    def __init__(
        self, bench: Workbench, prompts: Sequence[TrainingPrompt], concepts: Mapping[str, Concept]
    ) -> None:
        self._bench = bench
        self.prompts = prompts
        self.concepts = concepts
        #: Pictures by concept name and index of the prompt they were drawn for (-1: references); (n, 3, H,
        #: W).
        self._drawn: dict[tuple[str, int], Tensor] = {}
        self._cutouts: dict[tuple[str, int, int], Cutout] = {}
        size = bench.denoiser.picture_size
        self._references = {
            name: torch.stack([picture_tensor(picture, size) for picture in concept.references])
            for name, concept in concepts.items()
            if concept.references
        }

    def prepare(self, *, backgrounds: bool) -> None:
        """Draw what is missing: pictures of concepts without references, and backgrounds by the base.

        Every prompt gets its share of `Pictures.drawn`, at least one.

        Raises:
            ConfigError: if references are asked for and a concept has none.
        """
        source = self._bench.settings.source
        draws = torch.Generator().manual_seed(self._bench.seed + 1)
        for name in self.concepts:
            if name in self._references and source != "drawn":
                continue
            if source == "references":
                raise ConfigError(f"collage_source is 'references', and concept {name!r} has none")
            self._draw_concept(name, draws)
        if backgrounds:
            self._draw_backgrounds(draws)

    def of(self, name: str, prompt: int | None = None) -> Tensor:
        """Pictures (n, 3, H, W) of a concept; those drawn for this prompt where there are any.

        `name` "" gives the backgrounds.
        """
        if prompt is not None and (name, prompt) in self._drawn:
            return self._drawn[name, prompt]
        drawn = [pictures for (owner, _), pictures in self._drawn.items() if owner == name]
        return torch.cat(drawn) if drawn else self._references[name]

    def cutout(self, name: str, prompt: int, index: int) -> Cutout:
        """The object of picture `index` of `of(name, prompt)`, cut out once."""
        key = (name, prompt if (name, prompt) in self._drawn else -1, index)
        if key not in self._cutouts:
            self._cutouts[key] = cut_out(self.of(name, prompt)[index])
        return self._cutouts[key]

    def state_dict(self) -> dict[str, Any]:
        """The drawn pictures as bytes."""
        return {f"{name}\n{prompt}": (p * 255).round().byte() for (name, prompt), p in self._drawn.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The drawn pictures of a checkpoint; `prepare` is then not needed."""
        for key, pictures in state.items():
            name, prompt = key.split("\n")
            self._drawn[name, int(prompt)] = pictures.float() / 255

    def _draw_concept(self, name: str, draws: torch.Generator) -> None:
        for index, prompt in enumerate(self.prompts):
            if name in prompt.order:
                count = self._count(sum(name in other.order for other in self.prompts))
                composition = {"active_experts": [name]}
                self._drawn[name, index] = self._draw([prompt.only([name])] * count, draws, composition)

    def _draw_backgrounds(self, draws: torch.Generator) -> None:
        prompts, concepts = self.prompts, self.concepts
        for index, prompt in enumerate(prompts):
            names = [prompt.order[i % len(prompt.order)] for i in range(self._count(len(prompts)))]
            texts = [prompt.single_class(concepts[name]) for name in names]
            self._drawn["", index] = self._draw(texts, draws, {"mixture": "none"})

    def _count(self, prompts: int) -> int:
        return max(1, -(-self._bench.settings.drawn // prompts))

    def _draw(self, texts: list[str], draws: torch.Generator, composition: dict[str, Any]) -> Tensor:
        parts = [texts[i : i + _BATCH] for i in range(0, len(texts), _BATCH)]
        return torch.cat([self._bench.draw(part, draws, **composition) for part in parts])
