"""`Scaling`: the factor alpha / r of a delta; reading the numbers it is made of from what anybody wrote."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError, ExpertLoadError
from .reading import LARGEST

#: More than any use of an expert needs, and far below what half precision can hold in a sum.
LARGEST_SCALE = 1e4
#: Texts that say that nothing is said.
ABSENT = ("", "None", "null")


@dataclass(frozen=True)
class Scaling:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv 2312.03732).

    Attributes:
        alpha: a finite number.
        source: where it stands, for people.
        rank: the r it belongs to by that source; None if it names none.
        root: whether the square root of r is taken.
        fixed: whether `rank` counts also where the factors have another r, or none.
    """

    alpha: float
    source: str
    rank: float | None = None
    root: bool = False
    fixed: bool = False

    def factor(self, rank: int | None) -> float:
        """The factor of a delta.

        Args:
            rank: r of its factors; None for LoKr of two whole factors, which LyCORIS does not scale.
        """
        r = self.rank if self.fixed else rank
        if r is None:
            return 1.0
        return self.alpha / (math.sqrt(r) if self.root else r)


@dataclass(frozen=True)
class Target:
    """A matrix as settings speak of it.

    Attributes:
        part: the network it belongs to.
        names: what it may be called.
        rank: r of its factors; None where they have none.
        convolution: whether its kernel is larger than 1x1.
    """

    part: str
    names: Sequence[str]
    rank: int | None
    convolution: bool = False


def number(label: str, name: str, value: Any) -> float | None:
    """A finite number, also if it is written as text; None where nothing is said.

    Args:
        label: where it stands, for the error.
        name: what it is called there.
    Raises:
        ExpertLoadError: it is something else.
    """
    if value is None or (isinstance(value, str) and value.strip() in ABSENT):
        return None
    found = math.nan
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            found = float(value)
        except (ValueError, OverflowError):
            found = math.nan
    if not abs(found) <= LARGEST:
        raise ExpertLoadError(f"{label}: {name}={short(value)} is not a finite number.")
    return found


def truth(label: str, name: str, value: Any) -> bool:
    """True or False, also if it is written as text; False where nothing is said.

    Raises:
        ExpertLoadError: it is something else.
    """
    known = {"true": True, "false": False, "none": False, "null": False, "": False}
    word = str(value).strip().lower()
    if not isinstance(value, (bool, str, type(None))) or word not in known:
        raise ExpertLoadError(f"{label}: {name}={short(value)} is not allowed; choose true or false.")
    return known[word]


def check_scale(word: str, name: str, value: Any) -> float:
    """A factor that a user gave.

    Args:
        word: what the factor is called.
        name: the expert that it belongs to.
        value: the factor.

    Raises:
        ConfigError: it is no number, not finite, or so large that pictures are noise.
    """
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    # Not a number is not below anything.
    if not abs(number) <= LARGEST_SCALE:
        raise ConfigError(
            f"{word}={short(value)} of expert {name!r} is not allowed; choose a number from"
            f" -{LARGEST_SCALE:g} to {LARGEST_SCALE:g}."
        )
    return number


def short(value: Any) -> str:
    """A value from a file for an error, on one line and of bounded length."""
    return reprlib.repr(value)
