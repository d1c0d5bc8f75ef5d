"""Concepts and prompts: which words belong to which expert, and where they stand in a prompt."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.phrases import (
    GARMENT,
    KINDS,
    STYLE,
    SUBJECT,
    class_words,
    kind_of,
    listed,
    without_article,
)


@dataclass(frozen=True)
class Concept:
    """What one expert knows.

    Args:
        name: Name of the expert.
        text: Phrase with the trigger word, as it stands in prompts: `"a zorin boot"`.
        class_text: The same phrase in words that the base and CLIP know: `"a boot"`; a style needs none.
        references: Pictures of the subject; where there are none, the expert draws some alone.
        kind: What it changes: `"subject"` (has a place of its own), `"style"` (the whole picture) or
            `"garment"` (something on the subject that a prompt names before it, in that subject's place). ""
            takes what the phrase tells: "in zaphel style" is a style.

    Raises:
        ConfigError: if a phrase is empty, `references` has something that is no picture, or there is no such
            kind.
    """

    name: str
    text: str
    class_text: str
    references: Sequence[Image] = field(default_factory=tuple)
    kind: str = ""

    def __post_init__(self) -> None:
        if self.kind not in ("", *KINDS):
            raise ConfigError(
                f"kind of concept {self.name!r} is {self.kind!r}; allowed are {', '.join(KINDS)}"
            )
        object.__setattr__(self, "kind", self.kind or kind_of(str(self.text)))
        for name in ("name", "text", "class_text"):
            value = getattr(self, name)
            if name == "class_text" and self.kind == STYLE and isinstance(value, str):
                continue
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
        value = {"text": value}
    allowed = {"name", "text", "class_text", "references", "kind"}
    if unknown := sorted(set(value) - allowed):
        raise ConfigError(f"concepts[{name!r}] has unknown fields {unknown}; allowed are {sorted(allowed)}")
    values = {"name": name, **value}
    if "text" not in values:
        raise ConfigError(f"concepts[{name!r}] has no 'text', the phrase with the trigger word")
    kind = values["kind"] = values.get("kind") or kind_of(str(values["text"]))
    values.setdefault("class_text", "" if kind == STYLE else class_words(values["text"]))
    return _as_concept(name, Concept(**values))


@dataclass(frozen=True)
class Mention:
    """A concept in a prompt: its words are `prompt.text[start:end]`; `kind` is the concept's."""

    name: str
    start: int
    end: int
    kind: str = SUBJECT


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

    @property
    def subjects(self) -> tuple[str, ...]:
        """Names of the concepts with a place of their own, from left to right."""
        return tuple(self._owner(place) for place in self._places)

    @property
    def styles(self) -> tuple[str, ...]:
        """Names of the concepts that change the whole picture."""
        return tuple(mention.name for mention in self.mentions if mention.kind == STYLE)

    def together(self, subject: str) -> tuple[str, ...]:
        """All concepts that show where a subject stands: itself, what it wears, and the styles."""
        (place,) = (place for place in self._places if self._owner(place) == subject)
        worn = [mention.name for mention in place if mention.name != subject]
        return (subject, *worn, *self.styles)

    def only(self, names: Collection[str]) -> str:
        """The prompt with some of its concepts, in its own order.

        "a zorin boot, a vim cat and a kipra clock at night" gives "a zorin boot and a kipra clock at night".
        Words between the subjects go with those that are left out; styles stay where they stand.
        """
        if set(self.order) <= set(names):
            return self.text
        lost = [mention for mention in self.mentions if mention.kind != STYLE and mention.name not in names]
        kept = [mention.name for mention in self.mentions if mention.kind == STYLE and mention.name in names]
        if not lost:
            return self._cut(self.text, [m for m in self.mentions if m.name not in names])
        places = [[mention for mention in place if mention.name in names] for place in self._places]
        return self._with([self.text[p[0].start : p[-1].end] for p in places if p], kept)

    def single_class(self, concept: Concept, styles: Collection[str] = ()) -> str:
        """As `only` for one concept, in class words: "a cat at night"; with some of the styles."""
        mention = next(mention for mention in self.mentions if mention.name == concept.name)
        return self._with([_class_words(self.text[mention.start : mention.end], concept)], styles)

    @property
    def _places(self) -> tuple[tuple[Mention, ...], ...]:
        """Mentions by place: each subject, with what it wears behind it; what stands first, before it."""
        places: list[list[Mention]] = []
        for mention in self.mentions:
            if mention.kind == STYLE:
                continue
            alone = bool(places) and all(one.kind == GARMENT for one in places[-1])
            if places and (mention.kind == GARMENT or alone):
                places[-1].append(mention)
            else:
                places.append([mention])
        return tuple(tuple(place) for place in places)

    @staticmethod
    def _owner(place: Sequence[Mention]) -> str:
        """The subject of a place; a garment that nobody wears has it for itself."""
        return next((mention.name for mention in place if mention.kind != GARMENT), place[0].name)

    def _with(self, words: Sequence[str], styles: Collection[str]) -> str:
        """The prompt with these words in place of its subjects, and only these of its styles."""
        places = self._places
        start, end = places[0][0].start, places[-1][-1].end
        drawn = [mention for mention in self.mentions if mention.kind == STYLE]
        inside = [mention for mention in drawn if start <= mention.start < end]
        between = [self.text[m.start : m.end] for m in inside if m.name in styles]
        middle = " ".join([*([listed(words)] if words else []), *between])
        text = self.text[:start] + middle + self.text[end:]
        shift = len(text) - len(self.text)
        outside = [m for m in drawn if m not in inside and m.name not in styles]
        moved = [
            m if m.start < start else Mention(m.name, m.start + shift, m.end + shift, m.kind) for m in outside
        ]
        return self._cut(text, moved)

    @staticmethod
    def _cut(text: str, mentions: Sequence[Mention]) -> str:
        """A text without some words."""
        for mention in sorted(mentions, key=lambda mention: -mention.start):
            text = _without(text, mention.start, mention.end)
        return text


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
                f"concept {concept.name!r} is in no prompt: write {_asked(concept)} in one of {texts}"
            )
    return result


def read_prompt(text: str, concepts: Mapping[str, Concept]) -> TrainingPrompt:
    """One prompt, as `read_prompts`; it may leave any concepts out but not all."""
    text = _insert_triggers(text, concepts)
    mentions: list[Mention] = []
    for concept in sorted(concepts.values(), key=lambda concept: -len(concept.text)):
        taken = [(m.start, m.end) for m in mentions]
        if (span := _find_concept(text, concept, taken)) is not None:
            mentions.append(Mention(concept.name, *span, concept.kind))
    if not mentions:
        phrases = [_asked(concept) for concept in concepts.values()]
        raise ConfigError(f"prompt {text!r} has no concept; it should have {', '.join(phrases)}")
    mentions.sort(key=lambda mention: mention.start)
    class_text = text
    for mention in reversed(mentions):
        words = _class_words(text[mention.start : mention.end], concepts[mention.name])
        if words:
            class_text = class_text[: mention.start] + words + class_text[mention.end :]
        else:
            class_text = _without(class_text, mention.start, mention.end)
    return TrainingPrompt(text, class_text, tuple(mentions))


def _insert_triggers(text: str, concepts: Mapping[str, Concept]) -> str:
    """`text` with trigger phrases in place of class words, for concepts it does not name by trigger."""
    taken: list[tuple[int, int]] = []
    missing: list[Concept] = []
    for concept in sorted(concepts.values(), key=lambda concept: -len(concept.text)):
        span = _find_concept(text, concept, taken)
        if span is None:
            missing.append(concept)
        else:
            taken.append(span)
    edits: list[tuple[int, int, str]] = []
    worded = [concept for concept in missing if concept.class_text.strip()]
    for concept in sorted(worded, key=lambda concept: -len(concept.class_text)):
        span = _find(text, concept.class_text, taken)
        if span is not None:
            taken.append(span)
            whole = text[slice(*span)].lower() == concept.class_text.lower()
            edits.append((*span, concept.text if whole else without_article(concept.text)))
    for start, end, words in sorted(edits, reverse=True):
        text = text[:start] + words + text[end:]
    return text


def _asked(concept: Concept) -> str:
    """The words that name a concept in a prompt, for messages."""
    return " or ".join(repr(words) for words in (concept.text, concept.class_text) if words)


def _without(text: str, start: int, end: int) -> str:
    """A text without the words from `start` to `end`, and without what they would leave behind."""
    before, after = text[:start].rstrip(), text[end:].lstrip()
    if not after or after[0] in ",.;":
        before = before.rstrip(" ,")
    if not before:
        return after.lstrip(" ,")
    return before + after if not after or after[0] in ",.;" else f"{before} {after}"


def _find_concept(text: str, concept: Concept, taken: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """As `_find`, for the phrase of a concept; the "in" before a style is part of it."""
    if concept.kind == STYLE and (span := _find(text, f"in {concept.text}", taken)) is not None:
        return span
    return _find(text, concept.text, taken)


def _find(text: str, phrase: str, taken: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """First place of a phrase (or of the phrase without its article) outside the `taken` spans."""
    for candidate in dict.fromkeys((phrase, without_article(phrase))):
        for match in re.finditer(rf"(?<!\w){re.escape(candidate)}(?!\w)", text, re.IGNORECASE):
            if all(match.end() <= start or match.start() >= end for start, end in taken):
                return match.span()
    return None


def _class_words(words: str, concept: Concept) -> str:
    """Class words in place of `words`, which are the concept's phrase with or without its article."""
    if concept.kind == STYLE:
        return concept.class_text
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
    found = {}
    for name, expert in experts.items():
        text = expert.triggers[0]
        kind = kind_of(text, expert.metadata.get("mole.kind", ""))
        noun = kind != STYLE and without_article(text) == text
        found[name] = _as_concept(name, {"text": f"a {text}" if noun else text, "kind": kind})
    return found
