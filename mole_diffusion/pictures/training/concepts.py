"""Concepts and prompts: which words belong to which expert, and where they stand in a prompt."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.phrases import class_words, listed, without_article


@dataclass(frozen=True)
class Concept:
    """What one expert knows.

    Args:
        name: Name of the expert.
        text: Phrase with the trigger word, as it stands in prompts: `"a zorin boot"`.
        class_text: The same phrase in words that the base and CLIP know: `"a boot"`.
        references: Pictures of the subject; where there are none, the expert draws some alone.

    Raises:
        ConfigError: if a phrase is empty or `references` has something that is no picture.
    """

    name: str
    text: str
    class_text: str
    references: Sequence[Image] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        for name in ("name", "text", "class_text"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ConfigError(
                    f"{name} of concept {self.name!r} is {value!r}; allowed is a text that is not empty"
                )
        for picture in self.references:
            if not isinstance(picture, Image):
                raise ConfigError(
                    f"references of concept {self.name!r} have {picture!r}; allowed are PIL pictures"
                )


def as_concepts(
    concepts: Mapping[str, Concept | Mapping[str, Any] | str] | Sequence[Concept], expert_names: Sequence[str]
) -> dict[str, Concept]:
    """Concepts by the name of their expert, in the order of `expert_names`.

    Args:
        concepts: `Concept` objects, or a mapping from expert name to a Concept, to a dictionary of its
            fields, or to a phrase (whose last word is then the class: "a zorin boot" gives "a boot").
        expert_names: The experts whose gates are trained.

    Raises:
        ConfigError: if a concept is for no expert, or an expert has no concept.
    """
    found: dict[str, Concept] = {}
    items = (
        concepts.items()
        if isinstance(concepts, Mapping)
        else [(concept.name, concept) for concept in concepts]
    )
    for name, value in items:
        found[name] = _as_concept(name, value)
    unknown = [name for name in found if name not in expert_names]
    missing = [name for name in expert_names if name not in found]
    if unknown or missing:
        raise ConfigError(
            f"concepts must name the experts {list(expert_names)}; "
            f"without expert: {unknown}, without concept: {missing}"
        )
    return {name: found[name] for name in expert_names}


def _as_concept(name: str, value: Concept | Mapping[str, Any] | str) -> Concept:
    if isinstance(value, Concept):
        if value.name != name:
            raise ConfigError(f"concepts[{name!r}] is the concept of {value.name!r}")
        return value
    if isinstance(value, str):
        return Concept(name, value, class_words(value))
    allowed = {"name", "text", "class_text", "references"}
    if unknown := sorted(set(value) - allowed):
        raise ConfigError(f"concepts[{name!r}] has unknown fields {unknown}; allowed are {sorted(allowed)}")
    values = {"name": name, **value}
    if "text" not in values:
        raise ConfigError(f"concepts[{name!r}] has no 'text', the phrase with the trigger word")
    values.setdefault("class_text", class_words(values["text"]))
    return _as_concept(name, Concept(**values))


@dataclass(frozen=True)
class Mention:
    """A concept in a prompt: its words are `prompt.text[start:end]`."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class TrainingPrompt:
    """A prompt with trigger words, and what follows from it.

    `mentions` are in the order of the prompt; `class_text` is the prompt in words that the base and CLIP
    know.
    """

    text: str
    class_text: str
    mentions: tuple[Mention, ...]

    @property
    def order(self) -> tuple[str, ...]:
        """Names of the concepts from left to right."""
        return tuple(mention.name for mention in self.mentions)

    def only(self, names: Collection[str]) -> str:
        """The prompt with some of its concepts, in its own order.

        "a zorin boot, a vim cat and a kipra clock at night" gives "a zorin boot and a kipra clock at night".
        Words between the concepts go with those that are left out.
        """
        if len(names) == len(self.mentions):
            return self.text
        words = [self.text[m.start : m.end] for m in self.mentions if m.name in names]
        return self._with(listed(words))

    def single_class(self, concept: Concept) -> str:
        """As `only` for one concept, in class words: "a cat at night"."""
        mention = next(mention for mention in self.mentions if mention.name == concept.name)
        return self._with(_class_words(self.text[mention.start : mention.end], concept))

    def _with(self, words: str) -> str:
        return self.text[: self.mentions[0].start] + words + self.text[self.mentions[-1].end :]


def read_prompts(prompts: str | Sequence[str], concepts: Mapping[str, Concept]) -> tuple[TrainingPrompt, ...]:
    """Find the concepts in each prompt, and put trigger words in where a prompt has only class words.

    A prompt may leave concepts out, as long as every concept stands in one of them.

    Raises:
        ConfigError: if there is no prompt, a prompt has no concept, or a concept is in no prompt.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise ConfigError("prompts is empty; at least one is needed")
    result = tuple(read_prompt(text, concepts) for text in texts)
    for concept in concepts.values():
        if not any(concept.name in prompt.order for prompt in result):
            raise ConfigError(
                f"concept {concept.name!r} is in no prompt: "
                f"write {concept.text!r} or {concept.class_text!r} in one of {texts}"
            )
    return result


def read_prompt(text: str, concepts: Mapping[str, Concept]) -> TrainingPrompt:
    """One prompt, as `read_prompts`; it may leave any concepts out but not all."""
    text = _insert_triggers(text, concepts)
    mentions: list[Mention] = []
    for concept in sorted(concepts.values(), key=lambda concept: -len(concept.text)):
        if (span := _find(text, concept.text, [(m.start, m.end) for m in mentions])) is not None:
            mentions.append(Mention(concept.name, *span))
    if not mentions:
        phrases = [f"{concept.text!r} or {concept.class_text!r}" for concept in concepts.values()]
        raise ConfigError(f"prompt {text!r} has no concept; it should have {', '.join(phrases)}")
    mentions.sort(key=lambda mention: mention.start)
    class_text = text
    for mention in reversed(mentions):
        words = _class_words(text[mention.start : mention.end], concepts[mention.name])
        class_text = class_text[: mention.start] + words + class_text[mention.end :]
    return TrainingPrompt(text, class_text, tuple(mentions))


def _insert_triggers(text: str, concepts: Mapping[str, Concept]) -> str:
    """`text` with trigger phrases in place of class words, for concepts it does not name by trigger."""
    taken: list[tuple[int, int]] = []
    missing: list[Concept] = []
    for concept in sorted(concepts.values(), key=lambda concept: -len(concept.text)):
        span = _find(text, concept.text, taken)
        if span is None:
            missing.append(concept)
        else:
            taken.append(span)
    edits: list[tuple[int, int, str]] = []
    for concept in sorted(missing, key=lambda concept: -len(concept.class_text)):
        span = _find(text, concept.class_text, taken)
        if span is not None:
            taken.append(span)
            whole = text[slice(*span)].lower() == concept.class_text.lower()
            edits.append((*span, concept.text if whole else without_article(concept.text)))
    for start, end, words in sorted(edits, reverse=True):
        text = text[:start] + words + text[end:]
    return text


def _find(text: str, phrase: str, taken: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """First place of a phrase (or of the phrase without its article) outside the `taken` spans."""
    for candidate in dict.fromkeys((phrase, without_article(phrase))):
        for match in re.finditer(rf"(?<!\w){re.escape(candidate)}(?!\w)", text, re.IGNORECASE):
            if all(match.end() <= start or match.start() >= end for start, end in taken):
                return match.span()
    return None


def _class_words(words: str, concept: Concept) -> str:
    """Class words in place of `words`, which are the concept's phrase with or without its article."""
    if words.lower() == concept.text.lower():
        return concept.class_text
    return without_article(concept.class_text)


def concepts_from_experts(experts: Mapping[str, Any]) -> dict[str, Concept]:
    """Concepts from the trigger texts in the headers of the experts' files.

    Raises:
        ConfigError: if an expert's file names no trigger.
    """
    silent = [name for name, expert in experts.items() if not expert.triggers]
    if silent:
        raise ConfigError(f"the files of the experts {silent} name no trigger: give `concepts` for them")
    texts = {name: expert.triggers[0] for name, expert in experts.items()}
    phrases = {name: text if without_article(text) != text else f"a {text}" for name, text in texts.items()}
    return {name: _as_concept(name, phrase) for name, phrase in phrases.items()}
