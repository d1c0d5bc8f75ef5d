"""How near the starter is to the scenes it was trained on: colours after the codec, edges of drawings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mole_diffusion.pictures.training.collage import object_mask
from mole_diffusion.starter.judge import to_tensor

from . import world
from .workshop import load_codec

Pixels = NDArray[np.uint8]


def codec_colours(out: Path, count: int = 10) -> dict[str, float]:
    """Subject -> mean CIEDE2000 inside it between scenes and what the codec gives back of them.

    Args:
        out: the starter's folder.
        count: scenes per subject, each with the subject alone on a background.
    """
    # Only measuring needs it: a machine that trains does without.
    from skimage.color import deltaE_ciede2000, rgb2lab

    codec = load_codec(out, torch.device("cpu"))
    rng = np.random.default_rng([99, 6])
    backgrounds = list(world.BACKGROUNDS)
    found = {}
    for name in world.SUBJECTS:
        things = [world.Thing(name, world.SUBJECT_STYLE)]
        scenes = [world.draw_scene(things, backgrounds[i % len(backgrounds)], rng) for i in range(count)]
        before = np.stack([scene.pixels for scene in scenes])
        with torch.no_grad():
            made = codec.decode(codec.encode(to_tensor(before)).latents).sample
        after = ((made.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).numpy()
        difference = deltaE_ciede2000(rgb2lab(before), rgb2lab(after))
        found[name] = float(difference[np.stack([scene.foreground for scene in scenes]) > 0.5].mean())
    return found


def edges(pictures: Sequence[Pixels]) -> float:
    """Mean size of the gradient of grey values (0..1, per pixel) inside the objects of pictures (H, W, 3)."""
    return fmean(_edges(picture) for picture in pictures if inside(picture).any())


def inside(picture: Pixels) -> NDArray[np.bool_]:
    """Where the objects of a picture (H, W, 3) are; rendered and drawn ones are told alike."""
    values = torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 255
    return object_mask(values)[0].numpy() > 0.5


def _edges(picture: Pixels) -> float:
    down, right = np.gradient(np.asarray(Image.fromarray(picture).convert("L"), np.float32) / 255)
    return float(np.hypot(down, right)[inside(picture)].mean())


def sharpness(
    drawn: Sequence[Image.Image], things: Sequence[Sequence[world.Thing]], backgrounds: Sequence[str]
) -> float:
    """Edges of drawn pictures over those of scenes rendered for the same prompts, in both styles of the base.

    Args:
        drawn: pictures of one object each, whose outline is told best.
        things: what each prompt names.
        backgrounds: of each prompt.
    """
    rng = np.random.default_rng([99, 7])
    rendered = [
        world.draw_scene([world.Thing(thing.kind, style) for thing in named], background, rng).pixels
        for style in world.FLAT_STYLES
        for named, background in zip(things, backgrounds, strict=True)
    ]
    return edges([np.asarray(picture.convert("RGB")) for picture in drawn]) / edges(rendered)
