"""Experts as tiles with their reference picture: one component, its value a list of plain dictionaries."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from mole_diffusion.app.session import Session
from mole_diffusion.app.setup import ExpertCard
from mole_diffusion.app.theme import static
from mole_diffusion.core import rules
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.pictures.files import open_picture

#: Side in pixels of the pictures in the tiles (drawn at half of it on dense screens).
_SIDE = 192
MAX_STRENGTH = 2.0

# Without any value in it: what a template is given becomes part of a program.
_TEMPLATE = '<div class="tiles" role="group"></div>'


def tiles(caption: str, elem_id: str) -> gr.HTML:
    """A group of tiles; its `select` event says that the user changed something."""
    return gr.HTML(
        value=[],
        html_template=_TEMPLATE,
        js_on_load=static("tiles.js"),
        apply_default_css=False,
        caption=caption,
        elem_id=elem_id,
    )


def mixing_tiles(session: Session, values: Any = None) -> list[dict[str, Any]]:
    """The chosen experts with switch and strength, as they stand in `values` where they are there."""
    before = {tile["name"]: tile for tile in read(values)}
    return [
        _tile(
            card,
            on=before.get(card.name, {}).get("on", True),
            colour=session.colour(card.name),
            strength=before.get(card.name, {}).get("strength", 1.0),
        )
        for card in session.cards
    ]


def library_tiles(session: Session) -> list[dict[str, Any]]:
    """All experts there are, the chosen ones switched on."""
    return [
        _tile(
            card,
            on=card.name in session.chosen,
            colour=session.colour(card.name) if card.name in session.chosen else "transparent",
        )
        for card in session.library.values()
    ]


def read(values: Any) -> list[dict[str, Any]]:
    """What a browser sent as the tiles' value: name, on and strength of each.

    Raises:
        ConfigError: something else.
    """
    if values in (None, ""):
        return []
    try:
        found: list[dict[str, Any]] = [
            {
                "name": str(tile["name"]),
                "on": bool(tile["on"]),
                "strength": float(tile.get("strength", 1.0)),
            }
            for tile in values
        ]
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ConfigError("the experts' tiles sent something that is no list of experts") from error
    for tile in found:
        rules.number(0, MAX_STRENGTH).check(f"strength of {tile['name']!r}", tile["strength"])
    return found


def active(values: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The names that are switched on."""
    return tuple(tile["name"] for tile in values if tile["on"])


def _tile(card: ExpertCard, *, on: bool, colour: str, strength: float | None = None) -> dict[str, Any]:
    return {
        "name": card.name,
        "initial": card.name[:1].upper(),
        "text": card.text or "no trigger known",
        "picture": _data_uri(card.picture) if card.picture else "",
        "colour": colour,
        "on": on,
        "adjustable": strength is not None,
        "strength": f"{1.0 if strength is None else strength:.2f}",
    }


@lru_cache(maxsize=256)
def _data_uri(path: Path) -> str:
    stream = io.BytesIO()
    thumbnail(path, _SIDE).save(stream, format="WEBP", quality=82)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def thumbnail(path: Path, side: int) -> Image.Image:
    """A square picture of this side, from the centre of a picture file."""
    image = open_picture(path)
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    square = image.crop((left, top, left + edge, top + edge))
    return square.resize((side, side), Image.Resampling.LANCZOS)
