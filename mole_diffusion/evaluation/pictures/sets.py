"""A set of experts made ready: files, concepts with pictures, and prompts in trigger and class words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from mole_diffusion.core.errors import ConfigError, UnknownExpertError
from mole_diffusion.core.phrases import kind_of, listed
from mole_diffusion.evaluation.pictures.protocol import ExpertSet, ExpertSource, Protocol, named
from mole_diffusion.pictures.files import PICTURES, open_picture, pictures_in
from mole_diffusion.pictures.training.concepts import Concept
from mole_diffusion.starter.location import STARTERS, starter_experts

#: Measures that compare a picture with its prompt: in class words, and with the subjects described.
CAPTIONS = CLASS_WORDS, DESCRIBED = "text", "described"


#: Commas with nothing between them.
_GAP = re.compile(r"(?: ?,)+ ?,| ,")


@dataclass(frozen=True)
class Scene:
    """A set of experts with everything that drawing and measuring it needs.

    Attributes:
        name: label of the set.
        files: what `load_expert` opens, by expert name.
        concepts: phrases and reference pictures, by expert name, in the set's order.
        prompts: the prompts in trigger words.
        class_prompts: the same in words that any CLIP knows.
        descriptions: what the experts' subjects look like, in a CLIP's words, by expert name.
        training_prompts: what methods are trained with.
        templates: the templates of `prompts`.
    """

    name: str
    files: Mapping[str, str]
    concepts: Mapping[str, Concept]
    prompts: tuple[str, ...]
    class_prompts: tuple[str, ...]
    descriptions: Mapping[str, str]
    training_prompts: tuple[str, ...]
    templates: tuple[str, ...]

    def named(self, prompt: int) -> tuple[str, ...]:
        """The experts that a prompt names."""
        return named(self.templates[prompt], list(self.concepts))

    def captions(self, prompt: int, alone: str | None = None) -> dict[str, str]:
        """A prompt as CLIPs are asked about it, by measure: in class words, and with subjects described.

        Args:
            prompt: its number.
            alone: the only expert that was active; the others' class words stay.
        """
        classes = self.class_prompts[prompt]
        if not self.descriptions:
            return {CLASS_WORDS: classes}
        described = {name: words for name, words in self.descriptions.items() if alone in (None, name)}
        return {CLASS_WORDS: classes, DESCRIBED: self._worded(prompt, described)}

    def training_concepts(self, references: int | None) -> dict[str, Concept]:
        """The concepts with only so many of their reference pictures."""
        return {
            name: replace(concept, references=concept.references[:references])
            for name, concept in self.concepts.items()
        }

    def alone_prompt(self, index: int, name: str) -> str:
        """Prompt `index` with one concept by its trigger and all others by their class."""
        return self._worded(index, {name: self.concepts[name].text})

    def _worded(self, prompt: int, phrases: Mapping[str, str]) -> str:
        """A prompt with these phrases, by expert name, and class words for the other concepts."""
        concepts = self.concepts.items()
        return fill(
            self.templates[prompt], [phrases.get(name, concept.class_text) for name, concept in concepts]
        )


def fill(template: str, phrases: Sequence[str]) -> str:
    """`"{all} on the beach"` -> `"a boot, a monster and a clock on the beach"`; without the gaps and commas
    that empty phrases leave.
    """
    filled = template.format(*phrases, all=listed([phrase for phrase in phrases if phrase] or [""]))
    return _GAP.sub(",", " ".join(filled.split())).strip(" ,")


def make_scene(protocol: Protocol, chosen: ExpertSet) -> Scene:
    """Look up the experts of a set.

    Raises:
        UnknownExpertError: a name that is neither in the protocol nor, with the starter, one of its experts.
        ConfigError: a reference picture that is not there.
    """
    found = {name: _source(protocol, name) for name in chosen.experts}
    concepts = {
        name: Concept(name, source.text, source.class_text, _references(name, source.references), source.kind)
        for name, source in found.items()
    }
    texts = [concept.text for concept in concepts.values()]
    classes = [concept.class_text for concept in concepts.values()]
    return Scene(
        name=chosen.label,
        files={name: source.file for name, source in found.items()},
        concepts=concepts,
        prompts=tuple(fill(template, texts) for template in protocol.prompts),
        class_prompts=tuple(fill(template, classes) for template in protocol.prompts),
        descriptions={name: source.description for name, source in found.items() if source.description},
        training_prompts=tuple(
            fill(template, texts) for template in protocol.training_prompts or protocol.prompts
        ),
        templates=protocol.prompts,
    )


def _source(protocol: Protocol, name: str) -> ExpertSource:
    if name in protocol.experts:
        return protocol.experts[name]
    catalogue = starter_experts(model=protocol.model) if protocol.model in STARTERS else {}
    if name not in catalogue:
        raise UnknownExpertError(name, [*protocol.experts, *catalogue])
    expert = catalogue[name]
    return ExpertSource(
        file=str(expert.path),
        text=expert.text,
        class_text=expert.class_text,
        kind=kind_of(expert.text, expert.kind),
        description=expert.description,
        references=tuple(str(path) for path in expert.references),
    )


def _references(name: str, given: str | Sequence[str]) -> list[Image.Image]:
    if isinstance(given, str):
        paths = pictures_in(given)
        if not paths:
            raise ConfigError(f"references of {name!r}: no pictures {PICTURES} in {given!r}")
    else:
        paths = [Path(path) for path in given]
    try:
        return [open_picture(path) for path in paths]
    except ConfigError as error:
        raise ConfigError(f"references of {name!r}: {error}") from error
