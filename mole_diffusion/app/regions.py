"""Regions painted in one picture, a colour per expert, to masks and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mole_diffusion.app.session import Session
from mole_diffusion.core.errors import ConfigError

#: Side in pixels of the canvas.
CANVAS = 512
#: The editor's value without paint and ground.
EMPTY: dict[str, Any] = {"background": None, "layers": [], "composite": None}
# Less paint than this share of the canvas is a slip of the brush.
_LEAST_SHARE = 0.002
_OPAQUE = 96


def title(painted: Sequence[str] = ()) -> str:
    """The heading of the regions, which says also when they are closed whether there are any."""
    named = f" · on for {', '.join(painted)}" if painted else ""
    return f"Regions: paint where an expert counts{named}"


def read_regions(session: Session, value: Mapping[str, Any] | None) -> dict[str, Image.Image]:
    """Masks from what the image editor sends; an expert whose colour is not there has none.

    Args:
        session: whose experts have which colours.
        value: the editor's value: "layers" are RGBA pictures.

    Raises:
        ConfigError: the editor sent something else.
    """
    if not value or not value.get("layers"):
        return {}
    try:
        layers = [np.asarray(layer.convert("RGBA")) for layer in value["layers"]]
    except AttributeError as error:
        raise ConfigError("the region editor sent something that is no picture") from error
    palette = np.array([_rgb(session.colour(name)) for name in session.chosen])
    if not len(palette):
        return {}
    masks: dict[str, Image.Image] = {}
    for i, name in enumerate(session.chosen):
        painted = np.zeros(layers[0].shape[:2], dtype=bool)
        for layer in layers:
            distance = np.abs(layer[..., None, :3].astype(int) - palette).sum(-1)
            painted |= (layer[..., 3] > _OPAQUE) & (distance.argmin(-1) == i)
        if painted.mean() >= _LEAST_SHARE:
            masks[name] = Image.fromarray(np.where(painted, 255, 0).astype(np.uint8))
    return masks


def paint_regions(session: Session, masks: Mapping[str, Image.Image]) -> dict[str, Any] | None:
    """The reverse: a value for the image editor; None without masks of chosen experts."""
    layer = Image.new("RGBA", (CANVAS, CANVAS), (0, 0, 0, 0))
    known = [name for name in masks if name in session.chosen]
    for name in known:
        mask = masks[name].convert("L").resize((CANVAS, CANVAS), Image.Resampling.NEAREST)
        layer.paste(Image.new("RGBA", layer.size, (*_rgb(session.colour(name)), 255)), mask=mask)
    return {"background": None, "layers": [layer], "composite": layer} if known else None


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
