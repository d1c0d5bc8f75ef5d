"""Settings of the training loop and of gates, checked when they are built."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from mole_diffusion.core.rules import Rule

_RULE, _WORD = "rule", "word"


def whole(default: int, low: int | None = 1, *, word: str | None = None) -> Any:
    """A setting of whole numbers from `low`."""
    return _setting(default, Rule("whole", -math.inf if low is None else low), word)


def number(default: float, low: float = 0.0, high: float = math.inf, *, word: str | None = None) -> Any:
    """A setting of numbers from `low` to `high`."""
    return _setting(default, Rule("number", low, high), word)


def positive(default: float, *, word: str | None = None) -> Any:
    """A setting of numbers above 0."""
    return _setting(default, Rule("number", 0.0, above=True), word)


def share(default: float, *, word: str | None = None) -> Any:
    """A setting of numbers from 0 to 1."""
    return _setting(default, Rule("number", 0.0, 1.0), word)


def choice(default: str, *words: str, word: str | None = None) -> Any:
    """A setting of one of some words; the default is one of them."""
    return _setting(default, Rule("word", words=(default, *words)), word)


def flag(default: bool, *, word: str | None = None) -> Any:
    """A setting of True and False."""
    return _setting(default, Rule("flag"), word)


def free(default: Any, *, word: str | None = None) -> Any:
    """A setting that its class checks itself."""
    return _setting(default, None, word)


def _setting(default: Any, rule: Rule | None, word: str | None) -> Any:
    return dataclasses.field(default=default, metadata={_RULE: rule, _WORD: word})


def words_of(kind: type) -> dict[str, str]:
    """Word -> field, of the settings in a class: the word is what a setting is called among others'."""
    return {
        field.metadata.get(_WORD) or field.name: field.name
        for field in dataclasses.fields(kind)
        if _RULE in field.metadata
    }


def check(settings: Any) -> None:
    """Check all settings of a dataclass against their rules.

    Raises:
        ConfigError: one is not allowed; it is called by its word.
    """
    for field in dataclasses.fields(settings):
        rule: Rule | None = field.metadata.get(_RULE)
        if rule is None or rule.allows(value := getattr(settings, field.name)):
            continue
        word = field.metadata.get(_WORD) or field.name
        raise rule.refusal(word, value)


#: Settings that change what is shown and kept, and nothing of what is trained.
COSMETIC = ("progress", "preview_every", "checkpoint_every")


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """What the loop needs to know, whatever is trained.

    Args:
        iterations: Number of iterations.
        schedule: `"cosine"` (down to zero at the last iteration) or `"constant"`.
        gradient_clip: Largest norm of the gradient of all that is trained together; 0 leaves it as it is.
        seed: Seed of everything that is drawn.
        checkpoint_every: Iterations between checkpoints, written where the trainer has a folder.
        preview_every: Iterations between previews; 0 makes none.
        progress: Show how far it is.

    Raises:
        ConfigError: if a value is out of range.
    """

    iterations: int = whole(400)
    schedule: Literal["cosine", "constant"] = choice("cosine", "constant")
    gradient_clip: float = number(1.0)
    seed: int = whole(0, None)
    checkpoint_every: int = whole(50)
    preview_every: int = whole(0, 0)
    progress: bool = flag(True)

    def __post_init__(self) -> None:
        check(self)

    def rate(self, iteration: int) -> float:
        """Share of the full learning rate in this iteration (from 0)."""
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * iteration / self.iterations))


@dataclass(frozen=True, kw_only=True)
class GateSettings(LoopSettings):
    """How gates are trained, on whatever objective.

    Args:
        alpha: Weight of the balance loss, which is 0 when all experts are used equally (paper: Eq. 16).
        balance: `"average"` balances the weights averaged over all gates, so that a gate may choose one
            expert where another chooses the next (paper: Eq. 15); `"per_gate"` balances every gate alone.
        gate_lr: Learning rate of the projections of pooled and token gates. Adam moves a gate on normalised
            features by at most `lr * sqrt(features)` a step, so 1e-5 would leave it uniform.
        flatten_lr: Learning rate of the projections of flattened gates, which have `L` times more inputs.
        scalar_lr: Learning rate of strengths and temperatures.
    """

    alpha: float = number(0.5)
    balance: Literal["average", "per_gate"] = choice("average", "per_gate")
    gate_lr: float = positive(1e-2)
    flatten_lr: float = positive(1e-5)
    scalar_lr: float = positive(1e-2)
