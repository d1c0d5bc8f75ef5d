"""What a setting may be, and the one sentence that refuses what it may not be."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from .errors import ConfigError


@dataclass(frozen=True)
class Rule:
    """What a setting may be: a finite number of a range, one of some words, or yes and no.

    Attributes:
        kind: "whole", "number", "word" or "flag".
        low: smallest number.
        high: largest number.
        above: `low` itself is not allowed.
        words: the allowed words.
    """

    kind: Literal["whole", "number", "word", "flag"]
    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    words: tuple[str, ...] = ()

    def allows(self, value: Any) -> bool:
        """Whether a value may be set."""
        if self.kind == "flag":
            return isinstance(value, bool)
        if self.kind == "word":
            return isinstance(value, str) and value in self.words
        numbers = int if self.kind == "whole" else (int, float)
        if isinstance(value, bool) or not isinstance(value, numbers) or value in (math.inf, -math.inf):
            return False
        return (value > self.low if self.above else value >= self.low) and value <= self.high

    @property
    def allowed(self) -> str:
        """The allowed values in words."""
        if self.kind == "flag":
            return "True and False"
        if self.kind == "word":
            return quoted(self.words)
        what = "whole numbers" if self.kind == "whole" else "numbers"
        low = "" if self.low == -math.inf else f" {'above' if self.above else 'from'} {self.low:.10g}"
        return what + low + ("" if self.high == math.inf else f" to {self.high:.10g}")

    def refusal(self, name: str, value: Any) -> ConfigError:
        """The error of a value that may not be set; the setting is called `name`."""
        return ConfigError(f"{name} is {value!r}; allowed are {self.allowed}")

    def demand(self, name: str, value: Any) -> None:
        """Check a value that has to be there.

        Args:
            name: what users call the setting.
            value: what was given.

        Raises:
            ConfigError: it may not be set.
        """
        if not self.allows(value):
            raise self.refusal(name, value)

    def check(self, name: str, value: Any, *, absent: Any = None) -> None:
        """Check a value.

        Args:
            name: what users call the setting.
            value: what was given; None is not checked.
            absent: another value that stands for nothing and is not checked.
        Raises:
            ConfigError: it may not be set.
        """
        if value is not None and value != absent and not self.allows(value):
            raise self.refusal(name, value)


def whole(low: float = 1, high: float = math.inf) -> Rule:
    """Whole numbers from `low` to `high`."""
    return Rule("whole", low, high)


def number(low: float, high: float, *, above: bool = False) -> Rule:
    """Numbers from `low`, or above it, to `high`."""
    return Rule("number", low, high, above=above)


def word(words: tuple[str, ...]) -> Rule:
    """One of some words."""
    return Rule("word", words=words)


#: Yes or no.
FLAG = Rule("flag")


def quoted(values: Iterable[str]) -> str:
    """Words in quotes, separated by commas."""
    return ", ".join(repr(value) for value in values)
