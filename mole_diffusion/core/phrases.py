"""Phrases of concepts as they stand in a prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .errors import ConfigError

_ARTICLE = re.compile(r"^(?:a|an|the)\s+", re.IGNORECASE)


def listed(phrases: Sequence[str]) -> str:
    """ "a boot, a monster and a clock"; a single phrase as it is."""
    *first, last = phrases
    return f"{', '.join(first)} and {last}" if first else last


def without_article(phrase: str) -> str:
    """ "a zor boot" -> "zor boot"."""
    return _ARTICLE.sub("", phrase)


def class_words(phrase: str) -> str:
    """What a phrase with a trigger word says in words that a base knows: "a zor boot" -> "a boot"."""
    article = _ARTICLE.match(phrase)
    words = without_article(phrase).split()
    return (article.group(0) if article else "") + (words[-1] if words else "")


def read_concept(line: str) -> tuple[str, str, str]:
    """What a user says of an expert: "boot = a zor boot | a boot", with any spaces.

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
