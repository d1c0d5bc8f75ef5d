"""Means with intervals, and paired win rates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from mole_diffusion.evaluation.schema import Schema

#: What one item of a method is compared on; see `Schema.pair`.
Cell = tuple[Any, ...]

RESAMPLES = 2000
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval, and how often the method wins against the baseline on the same item.

    Attributes:
        mean, low, high: of the measure.
        count: how many items are behind it.
        wins: share of pairs won, ties half; None for the baseline itself or without pairs.
    """

    mean: float
    low: float
    high: float
    count: int
    wins: float | None = None


def cells(schema: Schema, rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[Cell, float]]:
    """measure -> cell -> value; rows of the same cell count as one, their mean."""
    gathered: dict[str, dict[Cell, list[float]]] = {}
    for row in rows:
        for name, value in schema.measures(row).items():
            gathered.setdefault(name, {}).setdefault(schema.pair_of(row), []).append(value)
    return {
        name: {cell: float(np.mean(values)) for cell, values in table.items()}
        for name, table in gathered.items()
    }


def mean_and_interval(values: Mapping[Cell, float], n_unit: int) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval (percentiles of 2000 resamples, always the same ones).

    Cells that agree in their first `n_unit` entries (pictures of one set and prompt, examples of one task)
    are alike, so they are resampled together: the units are their means, and each counts once in the mean,
    however many cells it has. With a single unit, the units are the cells.
    """
    groups: dict[Cell, list[float]] = {}
    for cell, value in values.items():
        groups.setdefault(cell[:n_unit], []).append(value)
    units = [float(np.mean(group)) for group in groups.values()]
    if len(units) == 1:
        units = list(values.values())
    mean = float(np.mean(units))
    if len(set(units)) == 1:
        return mean, mean, mean
    found = bootstrap(
        (np.asarray(units),),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=_CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return mean, float(found.low), float(found.high)


def win_rate(values: Mapping[Cell, float], baseline: Mapping[Cell, float]) -> float | None:
    """Share of cells in which the method is above the baseline; ties count half; None without pairs."""
    pairs = [(value, baseline[cell]) for cell, value in values.items() if cell in baseline]
    if not pairs:
        return None
    return float(np.mean([0.5 if own == other else float(own > other) for own, other in pairs]))


def estimate(
    schema: Schema, rows: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]]
) -> dict[str, Estimate]:
    """Every measure of one method's rows, against the baseline's rows."""
    others = cells(schema, baseline)
    found = {}
    for name, values in cells(schema, rows).items():
        wins = None if rows is baseline else win_rate(values, others.get(name, {}))
        found[name] = Estimate(*mean_and_interval(values, schema.n_unit), len(values), wins)
    return found
