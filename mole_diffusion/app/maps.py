"""Where in a picture each expert acts, as the picture in grey with the expert's colour over it."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping

import numpy as np
from markupsafe import Markup
from PIL import Image, ImageColor
from torch import Tensor

from mole_diffusion.app import markup

#: Longest side in the page, and how much of the colour the largest share gets.
_SIDE, _MOST = 320, 0.8


def overlay(picture: Image.Image, shares: Tensor, colour: str, top: float) -> Image.Image:
    """The picture in grey, with a colour as strong as the share of each place.

    Args:
        picture: what was drawn.
        shares: (height, width) of the latents, 0 to 1.
        colour: of the expert.
        top: the share that gets the whole colour.
    """
    grey = picture.convert("L").convert("RGB")
    grey.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    strength = (shares / max(top, 1e-6)).clamp(0, 1).mul(255 * _MOST).round()
    mask = Image.fromarray(strength.numpy().astype(np.uint8)).resize(grey.size, Image.Resampling.BILINEAR)
    return Image.composite(Image.new("RGB", grey.size, ImageColor.getrgb(colour)), grey, mask)


def maps_html(picture: Image.Image, maps: Mapping[str, Tensor], colours: Mapping[str, str]) -> Markup:
    """One figure per expert, with the expert's mean share; the largest share anywhere has the full colour.

    Args:
        picture: what was drawn.
        maps: expert -> (height, width).
        colours: expert -> colour.
    """
    top = max((float(shares.max()) for shares in maps.values()), default=0.0)
    figures = markup.join(
        markup.html(
            '<figure><img src="data:image/webp;base64,{}" alt="{}"><figcaption>{}</figcaption></figure>',
            _encoded(overlay(picture, shares, colours[name], top)),
            f"where {name} acts",
            markup.dot(markup.html("{} <b>{:.2f}</b>", name, float(shares.mean())), colours[name]),
        )
        for name, shares in maps.items()
    )
    said = markup.hint(
        "Where each expert acts: its share of the gates of image tokens, mean over all gates and steps. Full"
        f" colour is {top:.2f}; beside the name stands the mean over the picture."
    )
    return markup.html('<div class="maps">{}</div>{}', figures, said)


def _encoded(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "WEBP", quality=85)
    return base64.b64encode(file.getvalue()).decode("ascii")
