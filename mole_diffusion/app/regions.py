"""Regions: a sheet in the page on which they are painted, and the masks that it sends."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from mole_diffusion.app.metadata import mask_from_text, mask_to_text
from mole_diffusion.app.session import Session
from mole_diffusion.app.theme import static
from mole_diffusion.core.errors import ConfigError, MoLEError
from mole_diffusion.pictures.files import open_picture

#: Side in pixels of what is painted, in the sheet's page and program too.
CANVAS = 512
# Less paint than this share of the sheet is a slip of the brush.
_LEAST_SHARE = 0.002
# Masks of experts that are not chosen at the moment stay, for when they are again.
_MOST = 64
#: Base64 of a mask as the sheet sends it; noise would be longer.
_LONGEST = 64 * 2**10


def sheet() -> gr.HTML:
    """The sheet, a plain canvas; its `input` event says that a stroke has ended.

    Its value is a list of {"name", "mask"}: an expert, and the PNG of its mask as base64.
    """
    return gr.HTML(
        value=[],
        html_template=static("regions.html"),
        js_on_load=static("regions.js"),
        apply_default_css=False,
        elem_id="canvas",
        **_surroundings(None),
    )


def around(session: Session, ground: Path | None) -> dict[str, Any]:
    """An update of the sheet that leaves the paint as it is: whose colours there are, and what lies below.

    Args:
        session: whose experts.
        ground: a picture to paint over.
    """
    updated: dict[str, Any] = gr.update(**_surroundings(session, ground))
    return updated


def _surroundings(session: Session | None, ground: Path | None = None) -> dict[str, Any]:
    chosen = () if session is None else session.chosen
    experts = [{"name": name, "colour": session.colour(name)} for name in chosen if session is not None]
    return {"experts": experts, **(_ground(ground) if ground else {"ground": "", "aspect": 1.0})}


@lru_cache(maxsize=32)
def _ground(path: Path) -> dict[str, Any]:
    """A picture, drawn out to the sheet's square as masks are, and the shape it has (width / height)."""
    image = open_picture(path)
    stream = io.BytesIO()
    image.resize((CANVAS, CANVAS), Image.Resampling.LANCZOS).save(stream, format="WEBP", quality=85)
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    return {"ground": f"data:image/webp;base64,{data}", "aspect": image.width / image.height}


def title(painted: Sequence[str] = ()) -> str:
    """The heading of the regions, which says also when they are closed whether there are any."""
    named = f" · on for {', '.join(painted)}" if painted else ""
    return f"Regions: paint where an expert counts{named}"


def kept(value: Any, before: Any = None) -> dict[str, str]:
    """What the sheet sent, to be kept: expert -> PNG of its mask as base64.

    Args:
        value: the sheet's value.
        before: what is kept already; masks that are in it are not looked at again.

    Raises:
        ConfigError: it sent something else, or what is no mask.
    """
    if value in (None, ""):
        return {}
    if not isinstance(value, (list, tuple)) or len(value) > _MOST:
        raise ConfigError(f"the sheet for regions sent something that is no list of at most {_MOST} masks")
    known = set(before.values()) if isinstance(before, Mapping) else set()
    found = {}
    for entry in value:
        if not isinstance(entry, Mapping) or not all(isinstance(entry.get(n), str) for n in ("name", "mask")):
            raise ConfigError("the sheet for regions sent something that is no mask")
        text = entry["mask"]
        found[entry["name"]] = text if text in known else _settled(text)
    return found


def painted(texts: Any) -> list[dict[str, str]]:
    """The reverse of `kept`: a value for the sheet. What cannot be read is left out."""
    masks = _masks(texts)
    return [{"name": name, "mask": texts[name]} for name in masks]


def masks_of(session: Session, texts: Any) -> dict[str, Image.Image]:
    """The masks of chosen experts, black and white; none for an expert whose paint is a slip of the brush."""
    found = {}
    for name, mask in _masks(texts).items():
        if name in session.chosen and np.asarray(mask).mean() >= _LEAST_SHARE * 255:
            found[name] = mask
    return {name: found[name] for name in session.chosen if name in found}


def _masks(texts: Any) -> dict[str, Image.Image]:
    found = {}
    for name, text in texts.items() if isinstance(texts, Mapping) else ():
        try:
            found[name] = _plain(mask_from_text(text))
        except (MoLEError, TypeError):
            continue
    return found


def _settled(text: str) -> str:
    """A mask's text as it is, unless it is larger than the sheet makes them."""
    mask = mask_from_text(text)
    small = max(mask.size) <= CANVAS and len(text) <= _LONGEST
    return text if small else mask_to_text(_plain(mask))


def _plain(mask: Image.Image) -> Image.Image:
    """Black and white, of the sheet's size."""
    sized = mask.convert("L").resize((CANVAS, CANVAS), Image.Resampling.BILINEAR)
    return sized.point(lambda value: 255 if value > 127 else 0)
