"""The scenes that an expert of the starter was trained on, for other ways of learning the same subject."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache

import numpy as np
from PIL import Image

from mole_diffusion.starter.location import starter_dir

#: Scenes that are drawn, of the kind that the expert saw.
COUNT = 96
_BUILDERS = ("expert", "world")


@cache
def expert_scenes(name: str, count: int = COUNT) -> list[tuple[Image.Image, str]] | None:
    """Pictures with captions, of the kind that the expert of this name saw in its training.

    Args:
        name: a subject or a style of the starter.
        count: how many.

    Returns:
        None where they cannot be drawn: no such expert, no artwork (it is in the repository only) or no
        resvg_py (`pip install 'mole-diffusion[build]'`).
    """
    artwork = starter_dir().parent / "artwork"
    if not artwork.is_dir() or importlib.util.find_spec("resvg_py") is None:
        return None
    # The builders lie beside the artwork, in the repository, and not in what users install.
    expert, world = (importlib.import_module(f"tools.starter.{part}") for part in _BUILDERS)
    known = [*world.SUBJECTS, *world.STYLES]
    if name not in known:
        return None
    draw = expert.scene_of(name)
    rng = np.random.default_rng([expert.SEED, 200 + known.index(name)])
    scenes = [draw(rng) for _ in range(count)]
    return [(Image.fromarray(scene.pixels), scene.caption) for scene in scenes]
