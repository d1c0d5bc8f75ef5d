"""Invented languages: each has its own words, word order and particles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from .words import ADJECTIVES, NOUNS, VERBS, third

_ONSETS = "b d f g h k l m n p r s t v z".split()
_VOWELS = "a e i o u".split()


@dataclass(frozen=True)
class Phrase:
    """A noun with or without an adjective."""

    noun: str
    adjective: str | None = None


@dataclass(frozen=True)
class Sentence:
    """Who does what to whom."""

    subject: Phrase
    verb: str
    object: Phrase

    def plain(self) -> str:
        """In the plain language: "the red cat sees the hammer."."""
        return f"{_plain(self.subject)} {third(self.verb)} {_plain(self.object)}."


def _plain(phrase: Phrase) -> str:
    return f"the {phrase.adjective} {phrase.noun}" if phrase.adjective else f"the {phrase.noun}"


@dataclass(frozen=True)
class Language:
    """One invented language.

    Attributes:
        name: what prompts call it.
        order: of subject, verb and object, such as "sov".
        adjective_first: whether adjectives stand before their noun.
        subject_mark, object_mark: particles after the subject and the object; "" for none.
        words: plain word -> its own.
    """

    name: str
    order: str
    adjective_first: bool
    subject_mark: str
    object_mark: str
    words: Mapping[str, str]

    def render(self, sentence: Sentence) -> str:
        """A sentence in this language."""
        parts = {
            "s": self._phrase(sentence.subject, self.subject_mark),
            "v": self.words[sentence.verb],
            "o": self._phrase(sentence.object, self.object_mark),
        }
        return " ".join(parts[one] for one in self.order) + "."

    def _phrase(self, phrase: Phrase, mark: str) -> str:
        noun = self.words[phrase.noun]
        if phrase.adjective:
            adjective = self.words[phrase.adjective]
            noun = f"{adjective} {noun}" if self.adjective_first else f"{noun} {adjective}"
        return f"{noun} {mark}".strip()


def some_phrase(rng: Random, nouns: list[str] = NOUNS, chance: float = 0.5) -> Phrase:
    """A noun, with an adjective by chance."""
    return Phrase(rng.choice(nouns), rng.choice(ADJECTIVES) if rng.random() < chance else None)


def some_sentence(rng: Random) -> Sentence:
    """Any sentence."""
    return Sentence(some_phrase(rng), rng.choice(VERBS), some_phrase(rng))


_MEANINGS = [*NOUNS, *ADJECTIVES, *VERBS]
_TAKEN = {*_MEANINGS, "ka", "mu", "ti", "no", "so", "do", "go", "he", "me"}


@lru_cache
def _stems() -> list[str]:
    """Words of all languages, none of which is a plain word or another language's."""
    rng = Random("stems")
    found: dict[str, None] = {}
    while len(found) < 4 * len(_MEANINGS):
        word = rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_ONSETS)
        if rng.random() < 0.5:
            word += rng.choice(_VOWELS)
        if word not in _TAKEN:
            found[word] = None
    return list(found)


_FORMS = {
    "vel": ("sov", False, "", "ka"),
    "ron": ("vso", True, "mu", ""),
    "dak": ("svo", False, "", ""),
    "sol": ("osv", True, "", "ti"),
}
#: Languages whose dictionaries experts know.
TAUGHT = ("vel", "ron", "dak")
#: The language that the base itself can translate.
KNOWN = "sol"


@lru_cache
def language(name: str) -> Language:
    """A language by its name; "vel-3" is the third dialect of vel: the same words mean other things.

    Raises:
        KeyError: there is none.
    """
    family, _, dialect = name.partition("-")
    start = list(_FORMS).index(family) * len(_MEANINGS) if family in _FORMS else -1
    if start < 0:
        raise KeyError(f"no language is called {name!r}; known: {', '.join(_FORMS)}")
    own = _stems()[start : start + len(_MEANINGS)]
    if dialect:
        Random(name).shuffle(own)
    order, adjective_first, subject_mark, object_mark = _FORMS[family]
    words = dict(zip(_MEANINGS, own, strict=True))
    return Language(family, order, adjective_first, subject_mark, object_mark, words)
