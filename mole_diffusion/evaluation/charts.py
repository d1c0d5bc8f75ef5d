"""Charts of an evaluation with matplotlib: measures per method, and what gates learnt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from mole_diffusion.core.heat_map import short_group_name
from mole_diffusion.evaluation.schema import Heading
from mole_diffusion.evaluation.statistics import Estimate
from mole_diffusion.training.heat_map import MAX_COLUMNS_WITH_NAMES

#: Colours that stay apart for most colour-blind people (Okabe and Ito 2008).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7F7F7F", "#F0E442")


def measure_bars(methods: Mapping[str, Mapping[str, Estimate]], headings: Mapping[str, Heading]) -> Figure:
    """A panel per measure, a bar with its 95 % interval per method.

    Args:
        methods: method -> measure -> estimate.
        headings: the measures to draw, in order.
    """
    shown = [name for name in headings if any(name in row for row in methods.values())]
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    height = 0.9 + 0.27 * len(methods)
    figure = Figure(figsize=(4.2 * columns, height * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    places = np.arange(len(methods))
    for axes, measure in zip(panels, shown, strict=False):
        found = [row.get(measure) for row in methods.values()]
        means = np.array([entry.mean if entry else math.nan for entry in found])
        reach = np.array(
            [[entry.mean - entry.low, entry.high - entry.mean] if entry else [0, 0] for entry in found]
        ).T
        axes.barh(places, means, xerr=np.maximum(reach, 0), color=COLOURS[0], ecolor="0.25", capsize=2)
        heading = headings[measure]
        if heading.is_share:
            axes.set_xlim(0, 1)
        less = " (less is better)" if heading.less_is_better else ""
        axes.set_title(heading.title + less, loc="left", fontsize=10)
        axes.set_yticks(places, labels=list(methods))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    return figure


def entropy_curves(curves: Mapping[str, Sequence[Sequence[float]]], n_experts: int) -> Figure:
    """Mean entropy of the gates over training, a line per method (paper, Fig. 5a).

    Args:
        curves: method -> one sequence of entropies in nats per set of experts, a value per iteration.
        n_experts: experts per set: uniform gates have the entropy log N.
    """
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.axhline(math.log(n_experts), color="0.6", linewidth=1, linestyle="--")
    axes.annotate(
        f"uniform: log {n_experts}",
        (1.0, math.log(n_experts)),
        (-4, 4),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
    for (method, runs), colour in zip(curves.items(), _colours(len(curves)), strict=True):
        length = min(len(run) for run in runs)
        mean = np.mean([list(run[:length]) for run in runs], axis=0)
        axes.plot(np.arange(1, length + 1), mean, color=colour, linewidth=1.4, label=method)
    axes.set_xlabel("iteration")
    axes.set_ylabel("mean gate entropy (nats)")
    axes.set_ylim(0.0, math.log(max(n_experts, 2)) * 1.12)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="lower left")
    return figure


def expert_shares(shares: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """Mean gate weight per expert at the end of training, methods side by side (paper, Fig. 5b).

    Args:
        shares: set -> method -> expert -> mean weight.
    """
    methods = list(dict.fromkeys(method for row in shares.values() for method in row))
    columns = min(3, len(shares))
    rows = math.ceil(len(shares) / columns)
    figure = Figure(figsize=(3.9 * columns, 2.5 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    colours = _colours(len(methods))
    width = 0.8 / len(methods)
    for axes, (chosen, row) in zip(panels, shares.items(), strict=False):
        experts = list(next(iter(row.values())))
        for index, method in enumerate(methods):
            if method in row:
                places = np.arange(len(experts)) + (index - (len(methods) - 1) / 2) * width
                axes.bar(places, list(row[method].values()), width, color=colours[index], label=method)
        axes.axhline(1 / len(experts), color="0.5", linewidth=1, linestyle="--")
        axes.set_xticks(range(len(experts)), labels=experts)
        axes.set_title(chosen, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(shares) :]:
        axes.set_axis_off()
    panels[0].set_ylabel("mean gate weight")
    handles = {
        text: mark for axes in panels for mark, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False
    )
    return figure


def weights_over_steps(
    weights: NDArray[np.float64], groups: Sequence[str], experts: Sequence[str], *, title: str = ""
) -> Figure:
    """Gate weights over the denoising steps, a panel per expert (paper, Fig. 7).

    Args:
        weights: (gates, steps, experts).
        groups: names of the gates, in execution order.
        experts: names.
    """
    figure = Figure(
        figsize=(1.6 + 2.6 * len(experts), min(1.2 + 0.2 * len(groups), 12.0)), layout="constrained"
    )
    panels = figure.subplots(1, len(experts), squeeze=False, sharey=True)[0]
    top = max(float(weights.max()), 1e-6)
    image: Any = None
    for index, (axes, expert) in enumerate(zip(panels, experts, strict=True)):
        image = axes.imshow(weights[:, :, index], aspect="auto", cmap="viridis", vmin=0.0, vmax=top)
        axes.set_title(expert, fontsize=10)
        axes.set_xlabel("denoising step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(groups) <= MAX_COLUMNS_WITH_NAMES:
            axes.set_yticks(
                range(len(groups)), labels=[short_group_name(name) for name in groups], fontsize=7
            )
    figure.colorbar(image, ax=list(panels), label="gate weight", shrink=0.8)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _colours(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]
