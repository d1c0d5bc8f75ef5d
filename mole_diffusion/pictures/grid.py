"""Grids of labelled pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from mole_diffusion.core.errors import ConfigError

__all__ = ["GridRow", "picture_grid"]

INK = (28, 30, 36)
MUTED = (110, 114, 124)
PAPER = (255, 255, 255)


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
