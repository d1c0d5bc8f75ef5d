"""Linear arithmetic and other fixed weights behind the same interface as gates.

A fixed mixture is one weight per expert, the same in every layer, for every token and at every step. It
runs through the same hooks as trained gates (`Mixture.activate(weights=...)`): only the weights differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .errors import ConfigError, UnknownExpertError

#: Words for a mixture that is the same from the first forward to the last.
FIXED = ("gates", "la", "nla", "none")


def linear_arithmetic(names: Sequence[str]) -> dict[str, float]:
    """LA: the sum of the experts, `W + sum_i dW_i` (paper, section 2)."""
    return dict.fromkeys(names, 1.0)


def normalised_linear_arithmetic(names: Sequence[str]) -> dict[str, float]:
    """NLA: their mean, `W + sum_i dW_i / N`."""
    return {name: 1.0 / len(names) for name in names}


def fixed_mixture(
    mixture: str | Mapping[str, float], known: Sequence[str], active: Sequence[str] | None
) -> tuple[Sequence[str] | None, dict[str, float] | None]:
    """Which experts are active and with what fixed weights.

    Args:
        mixture: "gates" and "none" have no fixed weights; "la"; "nla"; or a weight per expert. Weights may be
            negative or above one.
        known: all loaded experts.
        active: the experts asked for; None is all, or those that a mapping names.

    Returns:
        The active experts and their weights; None where all are active, or where gates decide.

    Raises:
        ConfigError: an unknown word, a weight that is not finite, or an active expert without a weight.
        UnknownExpertError: a weight for an expert that is not loaded.
    """
    if isinstance(mixture, str):
        if mixture not in FIXED:
            raise ConfigError(f"mixture is {mixture!r}, expected one of {list(FIXED)} or a weight per expert")
        names = list(known if active is None else active)
        fixed = {"la": linear_arithmetic, "nla": normalised_linear_arithmetic}.get(mixture)
        return active, fixed(names) if fixed and names else None
    for name, weight in mixture.items():
        if name not in known:
            raise UnknownExpertError(name, known)
        if not math.isfinite(weight):
            raise ConfigError(
                f"mixture gives expert {name!r} the weight {weight!r}, expected a finite number"
            )
    chosen = list(mixture) if active is None else list(active)
    missing = [name for name in chosen if name not in mixture]
    if missing:
        raise ConfigError(f"mixture has no weight for the active experts {missing}; it names {list(mixture)}")
    return chosen, {name: float(mixture[name]) for name in chosen}
