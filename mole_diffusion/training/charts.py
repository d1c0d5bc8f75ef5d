"""The chart of gates' entropy in training (paper, Fig. 5a).

It returns the figure and writes nothing: command line and app put it where they want. Only matplotlib's
object interface is used: no global backend, safe in threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mole_diffusion.core.errors import ConfigError

__all__ = ["entropy_curve"]


def entropy_curve(iterations: Sequence[int], entropies: Sequence[float], n_experts: int) -> Figure:
    """Mean entropy of the gates, in nats, over training (paper, Fig. 5a), and log N (all alike) as a line.

    Raises:
        ConfigError: sequences that differ in length or are empty.
    """
    if not iterations or len(iterations) != len(entropies):
        raise ConfigError(
            f"entropies: {len(entropies)} values for {len(iterations)} iterations; need as many, at least one"
        )
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.axhline(math.log(n_experts), color="0.6", linewidth=1, linestyle="--")
    axes.annotate(
        f"uniform: log {n_experts}",
        (1.0, math.log(n_experts)),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        color="0.4",
        fontsize=8,
    )
    axes.plot(list(iterations), list(entropies), color="#3b6fb6", linewidth=1.6)
    axes.set_xlabel("iteration")
    axes.set_ylabel("mean gate entropy (nats)")
    axes.set_ylim(0.0, math.log(max(n_experts, 2)) * 1.12)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    return figure
