"""Pictures of the concepts: references that were given, or pictures the experts draw.

A subject is drawn by its expert alone, or with the experts of the prompt's styles and of what it wears.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mole_diffusion.core.auto import AutoSettings
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.phrases import STYLE
from mole_diffusion.pictures.auto import AutoMixture
from mole_diffusion.pictures.training.clip_guidance import ClipGuide
from mole_diffusion.pictures.training.collage import Cutout, cut_out
from mole_diffusion.pictures.training.concepts import Concept, TrainingPrompt
from mole_diffusion.pictures.training.ranking import best, rank_candidates
from mole_diffusion.pictures.training.workbench import Workbench, picture_tensor
from mole_diffusion.training.state import Preparation

#: Pictures drawn in one batch.
_BATCH = 8
# How a subject in a style is drawn. What is led on in the middle of a picture no gates can draw: trained on
# that, they give up the style.
_STYLED = AutoSettings(style_inside=0.6, balance=0.0)


class ConceptPictures:
    """Pictures of each concept, and backgrounds; drawn once, kept in the checkpoint.

    Args:
        bench: The shared workbench.
        prompts: The training prompts.
        concepts: The concept of each expert.
        preparation: Keeps pictures as they are drawn; None keeps none.
        guide: Ranks the candidates, where more are drawn than kept.
    """

    def __init__(
        self,
        bench: Workbench,
        prompts: Sequence[TrainingPrompt],
        concepts: Mapping[str, Concept],
        preparation: Preparation | None = None,
        guide: ClipGuide | None = None,
    ) -> None:
        self._bench = bench
        self._guide = guide
        self._preparation = preparation or Preparation()
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
        """Draw what is missing: pictures of subjects that have no references or are drawn in a style, and
        backgrounds by the base (and the styles).

        Every prompt gets its share of `Pictures.drawn`, at least one.

        Raises:
            ConfigError: if references are asked for and a concept has none.
        """
        source = self._bench.settings.source
        wanted: list[_Batch] = []
        for name in dict.fromkeys(name for prompt in self.prompts for name in prompt.subjects):
            if source == "references" and name not in self._references:
                raise ConfigError(f"collage_source is 'references', and concept {name!r} has none")
            wanted += self._concept_batches(name)
        if backgrounds:
            wanted += self._background_batches()
        self._draw(wanted)
        for (name, prompt), pictures in self._drawn.items():
            if name:
                self._drawn[name, prompt] = self._best(name, prompt, pictures)

    def of(self, name: str, prompt: int | None = None) -> Tensor:
        """Pictures (n, 3, H, W) of a concept; those drawn for this prompt where there are any.

        `name` "" gives the backgrounds.
        """
        if prompt is not None and (name, prompt) in self._drawn:
            return self._drawn[name, prompt]
        if name in self._references and self._bench.settings.source != "drawn":
            return self._references[name]
        drawn = [pictures for (owner, _), pictures in self._drawn.items() if owner == name]
        return torch.cat(drawn)

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

    def _concept_batches(self, name: str) -> Iterator[_Batch]:
        known = name in self._references and self._bench.settings.source != "drawn"
        for index, prompt in enumerate(self.prompts):
            if name not in prompt.subjects:
                continue
            together = prompt.together(name)
            # No reference picture shows a subject in a style.
            if known and len(together) == 1:
                continue
            count = self._count(sum(name in other.subjects for other in self.prompts))
            texts = [prompt.only(together)] * (count * self._bench.settings.candidates)
            yield from _batches((name, index), texts, self._mixture(together))

    def _mixture(self, names: Sequence[str]) -> dict[str, Any]:
        """Which experts draw, and with what scales."""
        if len(names) == 1:
            return {"active_experts": list(names)}
        styles = [name for name in names if self.concepts[name].kind == STYLE]
        if not styles:
            return {"mixture": dict.fromkeys(names, 1.0)}
        # Gates hold a subject in a style no better than the pictures that they learn from.
        phrases = {name: self.concepts[name].text for name in names}
        return {
            "mixture": AutoMixture(_STYLED, phrases=phrases, styles=styles),
            "active_experts": list(names),
        }

    def _background_batches(self) -> Iterator[_Batch]:
        for index, prompt in enumerate(self.prompts):
            subjects = prompt.subjects
            names = [subjects[i % len(subjects)] for i in range(self._count(len(self.prompts)))]
            texts = [prompt.single_class(self.concepts[name], prompt.styles) for name in names]
            styles = dict.fromkeys(prompt.styles, 1.0 / max(1, len(prompt.styles)))
            yield from _batches(("", index), texts, {"mixture": styles or "none"})

    def _best(self, name: str, prompt: int, pictures: Tensor) -> Tensor:
        """The pictures of a subject that are kept, of all that were drawn for a prompt."""
        count = -(-len(pictures) // self._bench.settings.candidates)
        if self._guide is None or count == len(pictures):
            return pictures
        whole, concept = self.prompts[prompt], self.concepts[name]
        styles = [self.concepts[style].class_text for style in whole.styles]
        text = " ".join([whole.single_class(concept), *styles]).strip()
        cutouts = [cut_out(picture) for picture in pictures]
        scores = rank_candidates(self._guide, pictures, cutouts, text, concept.class_text)
        return pictures[best(scores, count)]

    def _count(self, prompts: int) -> int:
        return max(1, -(-self._bench.settings.drawn // prompts))

    def _draw(self, wanted: Sequence[_Batch]) -> None:
        """Draw batch after batch; those that an earlier run has drawn are taken from there."""
        counter, draws = self._bench.counter, torch.Generator().manual_seed(self._bench.seed + 1)

        def make(index: int) -> Tensor:
            batch = wanted[index]
            return (self._bench.draw(batch.texts, draws, **batch.composition) * 255).round().byte()

        def state() -> dict[str, Any]:
            return {"draws": draws.get_state(), "passes": counter.state_dict()}

        def restore(kept: Mapping[str, Any]) -> None:
            draws.set_state(kept["draws"])
            counter.load_state_dict(kept["passes"])

        drawn = self._preparation.pieces(len(wanted), make, state, restore)
        for key in dict.fromkeys(batch.key for batch in wanted):
            own = [pictures for pictures, batch in zip(drawn, wanted, strict=True) if batch.key == key]
            self._drawn[key] = torch.cat(own).float() / 255


@dataclass(frozen=True)
class _Batch:
    """Pictures that are drawn at once.

    Attributes:
        key: name of the concept, "" for backgrounds, and index of the prompt.
        texts: one per picture.
        composition: which experts count.
    """

    key: tuple[str, int]
    texts: list[str]
    composition: dict[str, Any]


def _batches(key: tuple[str, int], texts: list[str], composition: dict[str, Any]) -> Iterator[_Batch]:
    for start in range(0, len(texts), _BATCH):
        yield _Batch(key, texts[start : start + _BATCH], composition)
