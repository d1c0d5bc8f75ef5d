"""Means with intervals, and paired win rates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from mole_diffusion.evaluation.metrics import CONFUSED, OMITTED, PRESENT

#: A picture of a method, whoever was drawn alone in it.
Cell = tuple[str, int, int]

JOINT = "joint"
RESAMPLES = 2000
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval, and how often the method wins against the baseline on the same seed.

    Attributes:
        mean, low, high: of the measure.
        pictures: how many pictures are behind it.
        wins: share of pairs won, ties half; None for the baseline itself or without pairs.
    """

    mean: float
    low: float
    high: float
    pictures: int
    wins: float | None = None


def measures(row: Mapping[str, Any]) -> dict[str, float]:
    """The measures of a picture as numbers: means over its concepts, and "joint" (all subjects there)."""
    found: dict[str, float] = {}
    for name, value in row["scores"].items():
        if isinstance(value, Mapping):
            if value:
                found[name] = float(np.mean(list(value.values())))
        else:
            found[name] = float(value)
    if PRESENT in found and not row.get("alone"):
        found[JOINT] = float(found[PRESENT] == 1.0)
    found["seconds"] = float(row["seconds"])
    return found


def cells(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[Cell, float]]:
    """measure -> (set, prompt, seed) -> value; the pictures of single experts count as one, their mean."""
    gathered: dict[str, dict[Cell, list[float]]] = {}
    for row in rows:
        cell = row["set"], row["prompt"], row["seed"]
        for name, value in measures(row).items():
            gathered.setdefault(name, {}).setdefault(cell, []).append(value)
    return {
        name: {cell: float(np.mean(values)) for cell, values in table.items()}
        for name, table in gathered.items()
    }


def interval(values: Mapping[Cell, float]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean (percentiles of 2000 resamples, always the same ones).

    Pictures of one set and prompt are alike, so whole prompts are resampled: the units are the means of
    (set, prompt). With a single set and prompt the units are the pictures.
    """
    groups: dict[tuple[str, int], list[float]] = {}
    for (chosen, prompt, _), value in values.items():
        groups.setdefault((chosen, prompt), []).append(value)
    units = [float(np.mean(group)) for group in groups.values()]
    if len(units) == 1:
        units = list(values.values())
    if len(units) == 1 or len(set(units)) == 1:
        return units[0], units[0]
    found = bootstrap(
        (np.asarray(units),),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=_CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def win_rate(values: Mapping[Cell, float], baseline: Mapping[Cell, float]) -> float | None:
    """Share of cells in which the method is above the baseline; ties count half; None without pairs."""
    pairs = [(value, baseline[cell]) for cell, value in values.items() if cell in baseline]
    if not pairs:
        return None
    return float(np.mean([0.5 if own == other else float(own > other) for own, other in pairs]))


def estimate(rows: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]]) -> dict[str, Estimate]:
    """Every measure of one method's rows, against the baseline's rows."""
    others = cells(baseline)
    found = {}
    for name, values in cells(rows).items():
        low, high = interval(values)
        wins = None if rows is baseline else win_rate(values, others.get(name, {}))
        found[name] = Estimate(float(np.mean(list(values.values()))), low, high, len(values), wins)
    return found


#: Measures of which less is better.
LESS_IS_BETTER = (CONFUSED, OMITTED, "others", "seconds")
