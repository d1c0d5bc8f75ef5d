"""Phrases of concepts as they stand in a prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .errors import ConfigError

#: What an expert changes: something in its own place of a picture, all of the picture, or what a subject
#: wears, in that subject's place.
SUBJECT, STYLE, GARMENT = KINDS = ("subject", "style", "garment")

_ARTICLE = re.compile(r"^(?:a|an|the)\s+", re.IGNORECASE)
_STYLE = re.compile(r"^in the style of\b|\bstyle$", re.IGNORECASE)


def listed(phrases: Sequence[str]) -> str:
    """ "a boot, a monster and a clock"; a single phrase as it is."""
    *first, last = phrases
    return f"{', '.join(first)} and {last}" if first else last


def without_article(phrase: str) -> str:
    """ "a zorin boot" -> "zorin boot"."""
    return _ARTICLE.sub("", phrase)


def class_words(phrase: str) -> str:
    """What a phrase with a trigger word says in words that a base knows: "a zorin boot" -> "a boot"."""
    article = _ARTICLE.match(phrase)
    words = without_article(phrase).split()
    return (article.group(0) if article else "") + (words[-1] if words else "")


def kind_of(phrase: str, said: str = "") -> str:
    """What an expert changes: as said, else as its phrase tells ("in zaphel style"), else a subject.

    Args:
        phrase: its words in prompts.
        said: what a file or a user says; "concept" is a subject, and what is no kind tells nothing.
    """
    if said in KINDS or said == "concept":
        return SUBJECT if said == "concept" else said
    return STYLE if _STYLE.search(phrase.strip()) else SUBJECT


def names_phrase(text: str, phrase: str) -> bool:
    """Whether a text has a phrase in it, with or without its article."""
    wanted = re.escape(without_article(phrase.strip()))
    return re.search(rf"(?<!\w){wanted}(?!\w)", text, re.IGNORECASE) is not None


def unnamed(text: str, phrases: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The experts that a prompt does not name: expert name -> the phrase to write for it.

    Args:
        text: the prompt.
        phrases: expert name -> phrases that call it; an expert without any is not asked for.
    """
    return {
        name: own[0]
        for name, own in phrases.items()
        if own and not any(names_phrase(text, phrase) for phrase in own)
    }


def read_concept(line: str) -> tuple[str, str, str, str]:
    """What a user says of an expert: "boot = a zorin boot | a boot" or "ink = inkart || style", any spaces.

    Returns:
        The expert's name, its phrase with the trigger word, the same in words that the base knows, and what
        it changes (one of `KINDS`). Behind the first bar stand the words, by default the `class_words` of the
        phrase and for a style none; behind the second the kind, by default that of `kind_of`.

    Raises:
        ConfigError: there is no name or no phrase, or no such kind.
    """
    name, _, words = (part.strip() for part in line.partition("="))
    text, known, kind, *more = (*(part.strip() for part in words.split("|")), "", "")
    if not name or not text or len(more) > 2:
        raise ConfigError(
            f"{line!r} does not say what an expert knows; write NAME = TEXT | CLASS | KIND, or NAME = TEXT"
        )
    if kind and kind not in KINDS:
        raise ConfigError(f"{line!r}: kind is {kind!r}; allowed are {', '.join(KINDS)}")
    kind = kind_of(text, kind)
    return name, text, known or ("" if kind == STYLE else class_words(text)), kind
