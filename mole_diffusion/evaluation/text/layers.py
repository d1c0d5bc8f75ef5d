"""An expert in a range of its layers (Table 5)."""

from __future__ import annotations

import dataclasses

from mole_diffusion.core.experts import Expert


def in_blocks(expert: Expert, low: float, high: float) -> Expert:
    """An expert in some of its blocks alone (Table 5).

    Args:
        expert: the whole.
        low, high: shares of each stack's depth, from 0 to 1.
    """
    factors = {}
    for part, own in expert.factors.items():
        numbers = {name: int(name.split(".")[2]) for name in own}
        depth = max(numbers.values()) + 1
        factors[part] = {name: one for name, one in own.items() if low <= numbers[name] / depth < high}
    return dataclasses.replace(
        expert,
        factors=factors,
        sha256=f"{expert.sha256} {low} {high}",
        name=f"{expert.name} {low:g}-{high:g}",
    )
