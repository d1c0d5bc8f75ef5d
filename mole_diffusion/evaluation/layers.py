"""An expert in a range of its layers (paper: Table 5 and Fig. 3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from mole_diffusion.core.experts import Expert
from mole_diffusion.core.mixture import Mixture


def in_blocks(expert: Expert, mixtures: Mapping[str, Mixture], low: float, high: float) -> Expert:
    """An expert in some of its blocks alone.

    Args:
        expert: the whole.
        mixtures: part -> a mixture that it is in, with a gate for each block.
        low, high: shares of each network's depth, from 0 to 1, in the order in which the blocks run.
    """
    factors = {}
    for part, mixture in mixtures.items():
        depth = len(mixture.groups)
        chosen = [one for number, one in enumerate(mixture.groups) if low <= number / depth < high]
        names = {slot.name for group in chosen for slot in group.slots}
        own = expert.factors.get(part, {})
        if found := {name: pair for name, pair in own.items() if name in names}:
            factors[part] = found
    return dataclasses.replace(expert, factors=factors, sha256=f"{expert.sha256} {low} {high}")
