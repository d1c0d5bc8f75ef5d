"""Gate weights as a picture, drawn with Pillow: ComfyUI has no matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_PAPER, _INK, _MUTED = (255, 255, 255), (28, 30, 36), (110, 114, 124)
#: From no weight to the largest: dark blue, green, yellow.
_COLOURS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], float)
_CELL = (34, 30)
_MARGIN, _TITLE, _LEGEND = 14, 28, 34
#: Wider cells than this number of columns needs carry their value.
_COLUMNS_WITH_VALUES = 40


def draw_heat_map(means: Mapping[str, Mapping[str, Sequence[float]]], names: Sequence[str]) -> Tensor:
    """One panel per network: experts as rows, gates as columns in the order in which they run.

    Args:
        means: part -> gate -> mean weight of each expert.
        names: the experts.
    Returns:
        (1, H, W, 3) in 0..1, as ComfyUI's IMAGE.
    """
    tables = {part: np.array(list(gates.values()), float).T for part, gates in means.items()}
    top = max(1e-6, *(float(table.max()) for table in tables.values()))
    font, small = ImageFont.load_default(15), ImageFont.load_default(11)
    label = max(int(font.getlength(name)) for name in names) + 2 * _MARGIN
    columns = max(table.shape[1] for table in tables.values())
    width = max(label + columns * _CELL[0] + _MARGIN, 420)
    height = _LEGEND + _MARGIN + len(tables) * (_TITLE + len(names) * _CELL[1] + _MARGIN)
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    y = _MARGIN // 2
    for part, table in tables.items():
        title = f"{part.replace('_', ' ')}: {table.shape[1]} gates, first to last"
        draw.text((_MARGIN, y + 6), title, _INK, font=font)
        y += _TITLE
        for row, name in enumerate(names):
            draw.text((_MARGIN, y + _CELL[1] // 2), name, _INK, font=font, anchor="lm")
            for column, value in enumerate(table[row]):
                _cell(
                    draw,
                    (label + column * _CELL[0], y),
                    value,
                    top,
                    small if columns <= _COLUMNS_WITH_VALUES else None,
                )
            y += _CELL[1]
        y += _MARGIN
    _legend(draw, (_MARGIN, y), top, small)
    pixels = np.asarray(sheet, dtype=np.float32) / 255
    return torch.from_numpy(pixels)[None]


def _cell(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    value: float,
    top: float,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont | None,
) -> None:
    x, y = at
    draw.rectangle((x, y, x + _CELL[0] - 2, y + _CELL[1] - 2), fill=_colour(value / top))
    if font is not None:
        ink = _INK if value > 0.6 * top else _PAPER
        middle = (x + _CELL[0] // 2 - 1, y + _CELL[1] // 2 - 1)
        draw.text(middle, f"{value:.2f}".lstrip("0"), ink, font=font, anchor="mm")


def _legend(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    top: float,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    x, y = at
    for i in range(120):
        draw.line((x + i, y, x + i, y + 10), fill=_colour(i / 119))
    draw.text((x, y + 13), "0", _MUTED, font=font)
    draw.text((x + 120, y + 13), f"{top:.2f}", _MUTED, font=font, anchor="ra")
    draw.text((x + 135, y), "mean gate weight", _MUTED, font=font)


def _colour(share: float) -> tuple[int, int, int]:
    place = min(max(share, 0.0), 1.0) * (len(_COLOURS) - 1)
    low = min(int(place), len(_COLOURS) - 2)
    mixed = _COLOURS[low] + (place - low) * (_COLOURS[low + 1] - _COLOURS[low])
    return int(mixed[0]), int(mixed[1]), int(mixed[2])
