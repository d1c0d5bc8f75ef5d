"""Charts of gates: their weights as a heat map (paper, Fig. 7), their entropy in training (Fig. 5a).

Every function returns the figure and writes nothing: command line and app put it where they want. Only
matplotlib's object interface is used: no global backend, safe in threads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mole_diffusion.core.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

__all__ = ["entropy_curve", "gate_heat_map"]

# With more columns than this the values in the cells, and then the names below them, can no longer be read.
MAX_COLUMNS_WITH_VALUES = 20
MAX_COLUMNS_WITH_NAMES = 48


def gate_heat_map(
    weights: Mapping[str, Mapping[str, Sequence[float] | NDArray[np.float64]]],
    expert_names: Sequence[str],
    *,
    title: str = "",
) -> Figure:
    """Heat map of gate weights: one panel per network, experts as rows, gates as columns in execution order.

    Args:
        weights: network -> group -> N numbers, as `core.records.in_order` returns them.
        expert_names: N names, in the order of the weights.

    Raises:
        ConfigError: no weights at all, or a group whose numbers are not N.
    """
    networks = {part: groups for part, groups in weights.items() if groups}
    if not networks:
        raise ConfigError("weights: no gate weights to draw; record a generation first")
    tables = {part: _as_table(part, groups, expert_names) for part, groups in networks.items()}
    top = max(float(table.max()) for table in tables.values())
    columns = [table.shape[1] for table in tables.values()]
    width = min(3.5 + 0.5 * max(max(columns), 8), 18.0)
    height = sum(1.9 + 0.38 * len(expert_names) for _ in tables)
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(len(tables), 1, squeeze=False)[:, 0]
    for axes, (part, table) in zip(panels, tables.items(), strict=True):
        image = axes.imshow(table, aspect="auto", cmap="viridis", vmin=0.0, vmax=max(top, 1e-6))
        axes.set_title(f"{part}: {table.shape[1]} gates", loc="left", fontsize=10)
        axes.set_yticks(range(len(expert_names)), labels=list(expert_names))
        _label_columns(axes, list(networks[part]))
        if table.shape[1] <= MAX_COLUMNS_WITH_VALUES:
            _write_values(axes, table, top)
    figure.colorbar(image, ax=list(panels), label="gate weight", shrink=0.8)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


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


def _as_table(
    part: str, groups: Mapping[str, Sequence[float] | NDArray[np.float64]], expert_names: Sequence[str]
) -> NDArray[np.float64]:
    columns = {group: np.asarray(values, dtype=np.float64) for group, values in groups.items()}
    for group, column in columns.items():
        if column.shape != (len(expert_names),):
            raise ConfigError(
                f"weights[{part!r}][{group!r}]: shape {column.shape}; need ({len(expert_names)},)"
            )
    return np.stack(list(columns.values()), axis=1)


def _label_columns(axes: Axes, names: list[str]) -> None:
    if len(names) > MAX_COLUMNS_WITH_NAMES:
        axes.set_xlabel("gates in execution order")
        return
    short = [short_group_name(name) for name in names]
    axes.set_xticks(range(len(names)), labels=short, rotation=45, ha="right", fontsize=7)


def short_group_name(name: str) -> str:
    """Abbreviate a module name: `down_blocks.0.attentions.1.transformer_blocks.0` -> `down 0.1.0`."""
    words = name.split(".")
    numbers = [word for word in words if word.isdigit()]
    head = words[0].removesuffix("_blocks").removesuffix("_block")
    tail = [] if words[-1].isdigit() or len(words) == 1 else [words[-1]]
    return " ".join([head, *([".".join(numbers)] if numbers else []), *tail])


def _write_values(axes: Axes, table: NDArray[np.float64], top: float) -> None:
    for (row, column), value in np.ndenumerate(table):
        color = "black" if value > 0.6 * top else "white"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
