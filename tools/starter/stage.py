"""Scenes drawn in batches, on the device that trains: every drawing at every size lies ready to be placed.

`world.draw_scene` draws one scene the same way with Pillow; a test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from . import world
from .styles import redraw

DRAWINGS = (*world.FLAT_STYLES, world.SUBJECT_STYLE)
SUBJECT = len(world.FLAT_STYLES)
"""Index of the three-dimensional drawing."""
HUES = 8
"""Turns of hue that recoloured scenes choose from; the first leaves a drawing as it is."""
SIDES = tuple(range(48, 101, 2))
LARGEST = SIDES[-1]
BACKGROUNDS = tuple(world.BACKGROUNDS)
STYLES = tuple(world.STYLES)
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "grey", "black", "brown")
NO_COLOUR = -1


@dataclass
class Placed:
    """A batch of scenes as numbers; up to three objects each, from left to right.

    Attributes:
        count: objects, (B,).
        kind, drawing, hue: index into CLASSES, DRAWINGS and turns of hue, (B, 3).
        side: largest side in pixels, an element of SIDES, (B, 3).
        x, y: centres in pixels, (B, 3).
        background: index into BACKGROUNDS, (B,).
        style: 0 is as drawn, else 1 + index into STYLES, (B,).
    """

    count: Tensor
    kind: Tensor
    drawing: Tensor
    hue: Tensor
    side: Tensor
    x: Tensor
    y: Tensor
    background: Tensor
    style: Tensor


def colour_of(picture: Image.Image) -> int:
    """The index in COLOURS that a person would call an RGBA drawing by, or NO_COLOUR where it has several."""
    rgba = np.asarray(picture, np.float32).reshape(-1, 4) / 255
    rgb = rgba[rgba[:, 3] > 0.6, :3]
    high, low = rgb.max(1), rgb.min(1)
    chroma = high - low
    if chroma.mean() < 0.13:
        light = float(high.mean())
        return COLOURS.index("white" if light > 0.8 else "black" if light < 0.3 else "grey")
    hue = np.asarray(Image.fromarray((rgb[None] * 255).astype(np.uint8)).convert("HSV"), np.float32)[0, :, 0]
    around = np.exp(2j * np.pi * hue / 256) * chroma
    mean = around.sum() / chroma.sum()
    if abs(mean) < 0.75:
        return NO_COLOUR
    degrees = float(np.angle(mean, deg=True)) % 360
    light = float((high * chroma).sum() / chroma.sum())
    if (degrees < 45 or degrees >= 345) and light < 0.6:
        return COLOURS.index("brown")
    bounds = ((16, "red"), (42, "orange"), (68, "yellow"), (165, "green"), (243, "blue"), (294, "purple"))
    name = next((name for bound, name in bounds if degrees < bound), "pink" if degrees < 342 else "red")
    return COLOURS.index(name)


class Stage:
    """All drawings, at all sizes, and a stock of backgrounds, on one device.

    Args:
        device: where scenes are drawn.
        hues: turns of hue that are kept; 1 is enough for scenes that recolour nothing.
    """

    def __init__(self, device: torch.device, hues: int = HUES) -> None:
        self.device, self.hues = device, hues
        drawn = [
            self._turned(world.sprite(kind, drawing), hue)
            for kind in world.CLASSES
            for drawing in DRAWINGS
            for hue in range(hues)
        ]
        self.colours = torch.tensor([colour_of(picture) for picture in drawn], device=device)
        self.extent = torch.tensor([p.size for p in drawn], device=device).float() / world.SIZE
        self.atlas = self._scaled(torch.stack([self._square(picture) for picture in drawn]).to(device))
        self.backdrops = self._backdrops(40).to(device)

    @staticmethod
    def _turned(picture: Image.Image, hue: int) -> Image.Image:
        return world.recoloured(picture, 360 / HUES * hue, 1.0, (1.0, 1.0, 1.0)) if hue else picture

    @staticmethod
    def _square(picture: Image.Image) -> Tensor:
        """Premultiplied RGBA (4, SIZE, SIZE) in 0..1, the drawing in the middle."""
        square = Image.new("RGBA", (world.SIZE, world.SIZE))
        width, height = picture.size
        square.paste(picture, ((world.SIZE - width) // 2, (world.SIZE - height) // 2))
        rgba = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float() / 255
        rgba[:3] *= rgba[3:]
        return rgba

    def _scaled(self, squares: Tensor) -> Tensor:
        """(sides, drawings, LARGEST, LARGEST) of four bytes, packed as one number."""
        rows = []
        for side in SIDES:
            parts = []
            for part in squares.split(64):
                small = F.interpolate(part, size=(side, side), mode="bilinear", antialias=True)
                padded = F.pad(small, (0, LARGEST - side, 0, LARGEST - side))
                parts.append((padded * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous())
            rows.append(torch.cat(parts).view(torch.int32)[..., 0])
        return torch.stack(rows)

    @staticmethod
    def _backdrops(count: int) -> Tensor:
        rng = np.random.default_rng(5)
        drawn = [np.stack([world.draw_background(name, rng) for _ in range(count)]) for name in BACKGROUNDS]
        return torch.from_numpy(np.stack(drawn).astype(np.uint8))

    @cached_property
    def _axis(self) -> Tensor:
        return torch.arange(world.SIZE, device=self.device)

    def index(self, kind: Tensor, drawing: Tensor, hue: Tensor) -> Tensor:
        """Number of a drawing."""
        return (kind * len(DRAWINGS) + drawing) * self.hues + hue

    def boxes(self, scenes: Placed) -> Tensor:
        """Centre x, centre y, width and height of every object in pixels, (B, 3, 4)."""
        extent = self.extent[self.index(scenes.kind, scenes.drawing, scenes.hue)] * scenes.side[..., None]
        return torch.cat([torch.stack([scenes.x, scenes.y], -1).float(), extent], -1)

    def clipped(self, scenes: Placed) -> Placed:
        """The scenes with every object moved inside the picture."""
        width, height = self.boxes(scenes)[..., 2:].unbind(-1)
        inside = [
            torch.minimum(torch.maximum(place, size / 2), world.SIZE - size / 2).round().long()
            for place, size in ((scenes.x, width), (scenes.y, height))
        ]
        scenes.x, scenes.y = inside
        return scenes

    def object_alpha(self, scenes: Placed, slot: int) -> tuple[Tensor, Tensor]:
        """Premultiplied RGB (B, 3, SIZE, SIZE) and coverage (B, 1, SIZE, SIZE) of one object, in 0..1."""
        side = scenes.side[:, slot]
        number = self.index(scenes.kind[:, slot], scenes.drawing[:, slot], scenes.hue[:, slot])
        sheet = (side - SIDES[0]) // 2 * self.atlas.shape[1] + number
        column = self._axis[None] - (scenes.x[:, slot] - side // 2)[:, None]
        row = self._axis[None] - (scenes.y[:, slot] - side // 2)[:, None]
        # Beyond its side a drawing is empty up to LARGEST; what lies further out is masked.
        inside = ((row >= 0) & (row < LARGEST))[:, :, None] & ((column >= 0) & (column < LARGEST))[:, None]
        inside &= (slot < scenes.count)[:, None, None]
        places = row.clamp(0, LARGEST - 1)[:, :, None] * LARGEST + column.clamp(0, LARGEST - 1)[:, None]
        packed = self.atlas.view(-1)[sheet[:, None, None] * LARGEST**2 + places] * inside
        rgba = packed[..., None].view(torch.uint8).permute(0, 3, 1, 2).float() / 255
        return rgba[:, :3], rgba[:, 3:]

    def draw(
        self, scenes: Placed, variety: Tensor, merged: Tensor | None = None, *, plain: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, SIZE, SIZE) in 0..1 and what objects cover, (B, 1, SIZE, SIZE).

        Args:
            variety: which of the stock's backgrounds, (B,).
            merged: scenes (B,) whose second object is drawn half over the first, as bad mixtures do.
            plain: no scene has a style; asking the device would make it wait.
        """
        canvas = self.backdrops[scenes.background, variety % self.backdrops.shape[1]]
        canvas = canvas.permute(0, 3, 1, 2).float() / 255
        cover = torch.zeros_like(canvas[:, :1])
        for slot in range(3):
            rgb, alpha = self.object_alpha(scenes, slot)
            if merged is not None and slot == 1:
                strength = torch.where(merged, 0.55, 1.0)[:, None, None, None]
                rgb, alpha = rgb * strength, alpha * strength
            canvas = canvas * (1 - alpha) + rgb
            cover = torch.maximum(cover, alpha)
        for number, style in enumerate(() if plain else STYLES, start=1):
            chosen = (scenes.style == number)[:, None, None, None]
            canvas = torch.where(chosen, redraw(canvas, style), canvas)
        return canvas, cover
