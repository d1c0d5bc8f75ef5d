"""Figures: gate heat map (paper, Fig. 7), entropy in training (Fig. 5a), grids of labelled pictures.

Every function returns the figure or picture and writes nothing: command line, app and nodes put it where they
want. Only matplotlib's object interface is used: no global backend, safe in threads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from mole_diffusion.core.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

__all__ = ["GridRow", "entropy_curve", "gate_heat_map", "picture_grid"]

INK = (28, 30, 36)
MUTED = (110, 114, 124)
PAPER = (255, 255, 255)
# With more columns than this the values in the cells, and then the names below them, can no longer be read.
MAX_COLUMNS_WITH_VALUES = 20
MAX_COLUMNS_WITH_NAMES = 48


@dataclass(frozen=True)
class GridRow:
    """One row of `picture_grid`.

    Attributes:
        label: what the row shows, written at its left.
        pictures: from left to right.
        note: explanation below the label, in grey.
        captions: nothing, or one text above each picture.
    """

    label: str
    pictures: Sequence[Image.Image]
    note: str = ""
    captions: Sequence[str] = ()


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


def picture_grid(rows: Sequence[GridRow], *, title: str = "", cell: int = 256) -> Image.Image:
    """Draw rows of pictures with their labels at the left.

    Args:
        rows: may have different numbers of pictures; short rows leave cells empty.
        title: a line on top.
        cell: side in pixels of the square in which every picture is fitted.

    Raises:
        ConfigError: no pictures, or a row with another number of captions than pictures.
    """
    n_columns = max((len(row.pictures) for row in rows), default=0)
    if n_columns == 0:
        raise ConfigError("rows: no pictures to draw")
    for row in rows:
        if row.captions and len(row.captions) != len(row.pictures):
            raise ConfigError(
                f"row {row.label!r}: {len(row.captions)} captions for {len(row.pictures)} pictures"
            )
    gap = max(cell // 32, 4)
    text, small, big = (_font(cell * part / 256) for part in (21, 16, 25))
    left, caption_height = int(cell * 1.15), int(cell * 0.11)
    top = 2 * gap + (int(cell * 0.16) if title else 0)
    heights = [cell + gap + (caption_height if row.captions else 0) for row in rows]
    sheet = Image.new("RGB", (left + n_columns * (cell + gap) + gap, top + sum(heights) + gap), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((gap * 2, gap * 2), title, INK, font=big)
    y = top
    for row, height in zip(rows, heights, strict=True):
        bottom = y + height - gap
        _write_label(draw, (gap * 2, bottom - cell + gap), left - gap * 3, row, text, small)
        for index, picture in enumerate(row.pictures):
            x = left + index * (cell + gap)
            sheet.paste(_fit(picture, cell), (x, bottom - cell))
            if row.captions:
                caption = _shortened(row.captions[index], cell, small)
                draw.text((x, bottom - cell - gap // 2), caption, MUTED, font=small, anchor="ls")
        y += height
    return sheet


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


def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(max(size, 8.0))


def _shortened(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text, or what of it fits into so many pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def _fit(picture: Image.Image, cell: int) -> Image.Image:
    """Scale into a cell x cell square, keeping the aspect, centred on white."""
    factor = cell / max(picture.size)
    size = (max(round(picture.width * factor), 1), max(round(picture.height * factor), 1))
    resized = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    square = Image.new("RGB", (cell, cell), PAPER)
    square.paste(resized, ((cell - size[0]) // 2, (cell - size[1]) // 2))
    return square


def _write_label(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    width: int,
    row: GridRow,
    text: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    small: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    x, y = at
    for content, font, colour in ((row.label, text, INK), (row.note, small, MUTED)):
        for line in _wrap(draw, content, font, width):
            draw.text((x, y), line, colour, font=font)
            y += int(draw.textbbox((0, 0), "Ag", font=font)[3] * 1.25)
        y += 4


def _wrap(
    draw: ImageDraw.ImageDraw, content: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[str]:
    lines: list[str] = []
    for word in content.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and draw.textlength(longer, font=font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
