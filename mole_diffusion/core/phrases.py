"""Phrases of concepts as they stand in a prompt."""

from __future__ import annotations

from collections.abc import Sequence


def listed(phrases: Sequence[str]) -> str:
    """ "a boot, a monster and a clock"; a single phrase as it is."""
    *first, last = phrases
    return f"{', '.join(first)} and {last}" if first else last
