"""Phrases of concepts as they stand in a prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .errors import ConfigError

_ARTICLE = re.compile(r"^(?:a|an|the)\s+", re.IGNORECASE)


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


def read_concept(line: str) -> tuple[str, str, str]:
    """What a user says of an expert: "boot = a zorin boot | a boot", with any spaces.

    Returns:
        The expert's name, its phrase with the trigger word, and the same in words that the base knows: as
        given behind the bar, else the `class_words` of the phrase.

    Raises:
        ConfigError: there is no name or no phrase.
    """
    name, _, words = (part.strip() for part in line.partition("="))
    text, _, known = (part.strip() for part in words.partition("|"))
    if not name or not text:
        raise ConfigError(
            f"{line!r} does not say what an expert knows; write NAME = TEXT | CLASS, or NAME = TEXT"
        )
    return name, text, known or class_words(text)
