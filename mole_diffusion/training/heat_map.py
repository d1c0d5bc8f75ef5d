"""Heat maps of gate weights as pictures, drawn with Pillow, which every host has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from mole_diffusion.core.heat_map import HeatMap, Panel, heat_map

if TYPE_CHECKING:
    Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

__all__ = ["gate_heat_map"]

_PAPER, _INK, _MUTED = (255, 255, 255, 255), (28, 30, 36), (110, 114, 124)
_CELL, _MARGIN, _TITLE, _LEGEND = (34, 30), 14, 28, 40
# With more columns than this the values in the cells, and then the names below them, can no longer be read.
MAX_COLUMNS_WITH_VALUES = 40
MAX_COLUMNS_WITH_NAMES = 48
_LEAST_CELL = 6
_LEAST_WIDTH = 420


def gate_heat_map(
    weights: Mapping[str, Mapping[str, Sequence[float]]],
    expert_names: Sequence[str],
    *,
    title: str = "",
    ink: tuple[int, int, int] = _INK,
    paper: tuple[int, int, int, int] = _PAPER,
) -> Image.Image:
    """Draw a heat map: one panel per network, experts as rows, gates as columns in execution order.

    Args:
        weights: network -> gate -> N numbers, as `core.records.in_order` returns them.
        expert_names: N names, in the order of the weights.
        title: a line on top.
        ink: colour of the letters (red, green, blue).
        paper: colour of the ground, with its opacity.
    Returns:
        A picture in "RGBA" where the ground can be seen through, else in "RGB".
    Raises:
        ConfigError: no weights at all, or a gate with another number of them than there are names.
    """
    shown = heat_map(weights, expert_names)
    sheet = _Sheet(shown, title, ink, paper)
    sheet.draw()
    return sheet.picture if paper[3] < 255 else sheet.picture.convert("RGB")


class _Sheet:
    """A picture of the size that a heat map needs."""

    def __init__(
        self, shown: HeatMap, title: str, ink: tuple[int, int, int], paper: tuple[int, int, int, int]
    ) -> None:
        self._shown, self._title, self._ink = shown, title, ink
        self._font, self._small = ImageFont.load_default(15), ImageFont.load_default(11)
        columns = max(len(panel.gates) for panel in shown.panels)
        self._cell = max(min(_CELL[0], _CELL[0] * MAX_COLUMNS_WITH_NAMES // columns), _LEAST_CELL)
        self._left = max(int(self._font.getlength(name)) for name in shown.experts) + 2 * _MARGIN
        width = max(self._left + columns * self._cell + _MARGIN, _LEAST_WIDTH)
        heights = [self._height(panel) for panel in shown.panels]
        height = (_TITLE if title else 0) + sum(heights) + _LEGEND + _MARGIN
        self.picture = Image.new("RGBA", (width, height), paper)
        self._draw = ImageDraw.Draw(self.picture)

    def _below(self, panel: Panel) -> int:
        """Height of the names under the columns."""
        if len(panel.gates) > MAX_COLUMNS_WITH_NAMES:
            return 0
        return max(int(self._small.getlength(label)) for label in panel.labels) + 8

    def _height(self, panel: Panel) -> int:
        return _TITLE + len(self._shown.experts) * _CELL[1] + self._below(panel) + _MARGIN

    def draw(self) -> None:
        """Put everything on the sheet."""
        y = _MARGIN // 2
        if self._title:
            self._draw.text((_MARGIN, y), self._title, self._ink, font=self._font)
            y += _TITLE
        for panel in self._shown.panels:
            self._panel(panel, y)
            y += self._height(panel)
        self._legend(y)

    def _panel(self, panel: Panel, y: int) -> None:
        self._draw.text((_MARGIN, y + 6), panel.title, self._ink, font=self._font)
        y += _TITLE
        for name, row in zip(self._shown.experts, panel.rows, strict=True):
            self._draw.text((_MARGIN, y + _CELL[1] // 2), name, self._ink, font=self._font, anchor="lm")
            for column, value in enumerate(row):
                self._square(self._left + column * self._cell, y, value, len(panel.gates))
            y += _CELL[1]
        if self._below(panel):
            for column, label in enumerate(panel.labels):
                self._upright(self._left + column * self._cell, y + 4, label)

    def _square(self, x: int, y: int, value: float, columns: int) -> None:
        shown = self._shown
        self._draw.rectangle((x, y, x + self._cell - 2, y + _CELL[1] - 2), fill=shown.colour(value))
        if columns <= MAX_COLUMNS_WITH_VALUES:
            middle = (x + self._cell // 2 - 1, y + _CELL[1] // 2 - 1)
            ink = _INK if shown.is_light(value) else _PAPER
            self._draw.text(middle, f"{value:.2f}".removeprefix("0"), ink, font=self._small, anchor="mm")

    def _upright(self, x: int, y: int, label: str) -> None:
        """Write a name from top to bottom, under the middle of its column."""
        mask = Image.new("L", (int(self._small.getlength(label)) + 2, 14))
        ImageDraw.Draw(mask).text((0, 0), label, 255, font=self._small)
        mask = mask.transpose(Image.Transpose.ROTATE_270)
        self.picture.paste(self._ink, (x + self._cell // 2 - 8, y), mask)

    def _legend(self, y: int) -> None:
        top = self._shown.top
        for i in range(120):
            at = _MARGIN + i
            self._draw.line((at, y, at, y + 10), fill=self._shown.colour(top * i / 119))
        muted = _MUTED if self._ink == _INK else self._ink
        for x, text, anchor in ((0, "0", "la"), (120, f"{top:.2f}", "ra")):
            self._draw.text((_MARGIN + x, y + 13), text, muted, font=self._small, anchor=anchor)
        self._draw.text((_MARGIN + 135, y - 2), "mean gate weight", muted, font=self._small)
