"""The starter's picture world: everyday objects drawn in a few styles, in front of ten backgrounds.

The base model learns the two flat styles. The third, three-dimensional drawing of an object (recoloured, so
that it is unmistakable at 50 pixels) is a *subject* the base never sees: the concept of one expert, as in
DreamBooth.
Artwork and licences: `assets/artwork` and NOTICE.
"""

from __future__ import annotations

import io
import itertools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from mole_diffusion.core.phrases import listed

from .styles import redraw

SIZE = 128
"""Side of a picture in pixels."""

CLASSES = (
    "boot monster clock smiley car vase wolf teapot cat can sneaker backpack "
    "dog bowl sunglasses robot teddy duck chair rocket tree guitar house mushroom"
).split()

FLAT_STYLES = ("noto", "twemoji")
SUBJECT_STYLE = "fluent3d"

# Concepts with an expert: trigger word, hue rotation in degrees, saturation factor, tint (factors of RGB).
_NO_TINT = (1.0, 1.0, 1.0)
SUBJECTS: dict[str, tuple[str, float, float, tuple[float, float, float]]] = {
    "boot": ("zorin", 0.0, 1.0, _NO_TINT),
    "monster": ("vekka", 180.0, 1.2, _NO_TINT),
    "clock": ("kipra", 250.0, 1.2, _NO_TINT),
    "smiley": ("lumo", 60.0, 1.0, _NO_TINT),
    "car": ("taskel", 120.0, 1.1, _NO_TINT),
    "vase": ("brunel", 150.0, 1.3, _NO_TINT),
    "wolf": ("moxa", 0.0, 1.0, (1.0, 0.62, 0.86)),
    "teapot": ("pelvo", 150.0, 1.0, _NO_TINT),
    "cat": ("fenna", 170.0, 1.0, _NO_TINT),
    "can": ("gidro", 280.0, 1.0, _NO_TINT),
    "sneaker": ("huxel", 0.0, 1.6, (1.0, 0.92, 0.45)),
    "backpack": ("javen", 220.0, 1.0, _NO_TINT),
    "dog": ("nibo", 240.0, 1.3, _NO_TINT),
    "bowl": ("quori", 180.0, 1.0, _NO_TINT),
    "sunglasses": ("rysa", 90.0, 1.4, (1.0, 1.25, 1.0)),
    "robot": ("woxan", 0.0, 1.0, (1.0, 0.86, 0.35)),
}
"""Class of each subject -> (trigger word, hue rotation, saturation, tint)."""

STYLES = {"sketch": "zaphel", "blueprint": "morvan", "print": "tilku", "neon": "glaro"}
"""Style experts -> trigger word."""

STYLE_WORDS = {
    "sketch": "as a pencil sketch",
    "blueprint": "as a blueprint",
    "print": "as a two-colour print",
    "neon": "in neon light",
}
"""The same styles in words that a CLIP knows."""

TRIGGERS = tuple(row[0] for row in SUBJECTS.values())

BACKGROUNDS = {
    "beach": "on the beach",
    "snow": "in the snow",
    "grass": "on the grass",
    "night": "at night",
    "fabric": "on pink fabric",
    "floor": "on a wooden floor",
    "desert": "in the desert",
    "sky": "in the sky",
    "white": "on white",
    "sunset": "at sunset",
}

# The fifteen sets of three concepts of the paper (its Table 1), with the nearest class of this world.
TRIPLES: tuple[tuple[str, str, str], ...] = (
    ("boot", "monster", "clock"),
    ("smiley", "car", "robot"),
    ("vase", "wolf", "teapot"),
    ("cat", "wolf", "can"),
    ("sneaker", "wolf", "teapot"),
    ("car", "wolf", "teapot"),
    ("can", "wolf", "backpack"),
    ("dog", "wolf", "teapot"),
    ("dog", "boot", "monster"),
    ("backpack", "bowl", "teapot"),
    ("backpack", "cat", "smiley"),
    ("dog", "wolf", "backpack"),
    ("cat", "sunglasses", "boot"),
    ("bowl", "can", "teapot"),
    ("robot", "dog", "clock"),
)

# Boxes of one, two and three objects in the order named: centre x, centre y, smallest and largest side.
LAYOUTS: dict[int, tuple[tuple[int, int, int, int], ...]] = {
    1: ((64, 68, 68, 100),),
    2: ((34, 72, 50, 60), (94, 72, 50, 60)),
    3: ((31, 88, 48, 58), (64, 34, 48, 58), (97, 88, 48, 58)),
}
JITTER = {1: (14, 10), 2: (4, 14), 3: (4, 5)}

Pixels = npt.NDArray[np.uint8]
Plane = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Thing:
    """One object of a scene; `style` is one of FLAT_STYLES or SUBJECT_STYLE."""

    kind: str
    style: str


@dataclass(frozen=True)
class Scene:
    """A drawn scene: pixels (128, 128, 3), foreground (128, 128) in 0..1, caption and what is in it."""

    pixels: Pixels
    foreground: Plane
    caption: str
    things: tuple[Thing, ...]
    background: str
    boxes: tuple[tuple[int, int, int, int], ...] = field(default=())


def artwork_dir() -> Path:
    """Folder of the artwork in a checkout of the repository."""
    return Path(__file__).resolve().parents[2] / "assets" / "artwork"


def held_out(kinds: Sequence[str]) -> bool:
    """Whether this set of object classes is kept out of all training scenes.

    The fifteen triples of the paper are, and, by a fixed hash, a tenth of the pairs (with every triple around
    them) and a tenth of the remaining triples.
    """
    unique = sorted(set(kinds))
    for pair in itertools.combinations(unique, 2):
        if zlib.crc32("+".join(pair).encode()) % 10 == 0 and not _inside_triple(pair):
            return True
    if len(unique) < 3:
        return False
    names = "+".join(unique)
    return zlib.crc32(names.encode()) % 10 == 0 or any(set(unique) == set(triple) for triple in TRIPLES)


def _inside_triple(pair: tuple[str, ...]) -> bool:
    # The pairs of the fifteen triples are trained, so that these triples test composition and nothing harder.
    return any(set(pair) <= set(triple) for triple in TRIPLES)


def caption_of(things: Sequence[Thing], background: str | None, words: Sequence[str] | None = None) -> str:
    """`"a cat, a boot and a clock on the beach"`; `words` replaces the names (to put in triggers)."""
    names = [
        "a pair of " + w if w.split()[-1] == "sunglasses" else "a " + w
        for w in words or [t.kind for t in things]
    ]
    text = listed(names)
    return f"{text} {BACKGROUNDS[background]}" if background else text


# --- artwork ----------------------------------------------------------------------------------------------


@cache
def sprite(kind: str, style: str) -> Image.Image:
    """The drawing of an object, RGBA, trimmed, at most 128 pixels on its longer side."""
    if style == SUBJECT_STYLE:
        picture = Image.open(artwork_dir() / style / f"{kind}.webp").convert("RGBA")
        if kind in SUBJECTS:
            picture = recoloured(picture, *SUBJECTS[kind][1:])
    else:
        import resvg_py

        svg = (artwork_dir() / style / f"{kind}.svg").read_text()
        picture = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=256, height=256))))
        picture = picture.convert("RGBA")
    box = picture.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox()
    picture = picture.crop(box)
    scale = SIZE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def recoloured(
    picture: Image.Image, hue: float, saturation: float, tint: tuple[float, float, float]
) -> Image.Image:
    """A drawing with its hue turned by degrees, its saturation and its RGB multiplied."""
    rgba = np.asarray(picture).astype(np.float32)
    hsv = np.asarray(picture.convert("RGB").convert("HSV")).astype(np.float32)
    hsv[..., 0] = (hsv[..., 0] + hue / 360 * 256) % 256
    hsv[..., 1] = np.clip(hsv[..., 1] * saturation, 0, 255)
    rgb = np.asarray(Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB")).astype(np.float32)
    rgba[..., :3] = np.clip(rgb * np.asarray(tint, np.float32), 0, 255)
    return Image.fromarray(rgba.astype(np.uint8), "RGBA")


# --- backgrounds ------------------------------------------------------------------------------------------

Colour = tuple[float, float, float]
Rng = np.random.Generator


def _gradient(top: Sequence[float], bottom: Sequence[float], rows: int = SIZE) -> Plane:
    t = np.linspace(0, 1, rows, dtype=np.float32)[:, None, None]
    plane = np.asarray(top, np.float32) * (1 - t) + np.asarray(bottom, np.float32) * t
    return np.broadcast_to(plane, (rows, SIZE, 3)).astype(np.float32)


def _horizon(sky: Plane, ground: Plane, row: int) -> Plane:
    out = sky.copy()
    out[row:] = ground[: SIZE - row]
    return out


def _landscape(sky: tuple[Colour, Colour], ground: tuple[Colour, Colour]) -> Callable[[Rng, int], Plane]:
    """Sky over ground, each from its upper to its lower colour."""
    return lambda rng, row: _horizon(_gradient(*sky), _gradient(*ground), row)


def _snow(rng: Rng, row: int) -> Plane:
    sky, ground = ((170, 190, 215), (215, 225, 235)), ((250, 252, 255), (232, 240, 248))
    plane = _landscape(sky, ground)(rng, row)
    for _ in range(26):
        x, y = rng.integers(0, SIZE - 3, 2)
        plane[y : y + 3, x : x + 3] = 255
    return plane


def _night(rng: Rng, row: int) -> Plane:
    plane = _gradient((16, 14, 52), (42, 34, 92)).copy()
    for _ in range(22):
        x, y = rng.integers(0, SIZE - 2, 2)
        plane[y : y + 2, x : x + 2] = (250, 245, 205)
    return plane


def _fabric(rng: Rng, row: int) -> Plane:
    phase = np.arange(SIZE, dtype=np.float32) / SIZE * 2 * np.pi * 4 + rng.uniform(0, 6.28)
    waves = np.sin(phase).astype(np.float32)
    flat = np.ones((SIZE, SIZE, 3), np.float32)
    return np.asarray((246, 178, 204), np.float32) + 12 * waves[:, None, None] * flat


def _floor(rng: Rng, row: int) -> Plane:
    plank = (np.arange(SIZE) + int(rng.integers(0, 32))) // 16
    shade = np.where(plank % 2 == 0, 1.0, 0.86).astype(np.float32)
    flat = np.ones((SIZE, SIZE, 3), np.float32)
    return np.asarray((176, 122, 76), np.float32) * shade[:, None, None] * flat


_PAINTERS: dict[str, Callable[[Rng, int], Plane]] = {
    "beach": _landscape(((120, 205, 235), (215, 240, 240)), ((240, 220, 160), (222, 190, 120))),
    "snow": _snow,
    "grass": _landscape(((140, 205, 250), (205, 235, 250)), ((98, 185, 66), (52, 135, 42))),
    "night": _night,
    "fabric": _fabric,
    "floor": _floor,
    "desert": _landscape(((248, 208, 150), (252, 232, 196)), ((214, 148, 84), (180, 112, 58))),
    "sky": lambda rng, row: _gradient((62, 132, 226), (160, 208, 248)),
    "white": lambda rng, row: np.full((SIZE, SIZE, 3), 250, np.float32),
    "sunset": _landscape(((92, 52, 112), (250, 142, 72)), ((52, 32, 62), (26, 16, 36))),
}


def draw_background(name: str, rng: Rng) -> Plane:
    """A background, float (128, 128, 3) in 0..255, with small random changes of colour and horizon."""
    if name not in _PAINTERS:
        raise ValueError(f"unknown background {name!r}; known: {', '.join(BACKGROUNDS)}")
    plane = _PAINTERS[name](rng, int(rng.integers(58, 78)))
    return np.clip(plane * (1 + rng.uniform(-0.05, 0.05, 3)).astype(np.float32), 0, 255)


# --- scenes -----------------------------------------------------------------------------------------------


def draw_scene(
    things: Sequence[Thing], background: str, rng: np.random.Generator, caption: str = ""
) -> Scene:
    """Place the objects in the order given (left, middle, right) on a background."""
    canvas = draw_background(background, rng).copy()
    foreground = np.zeros((SIZE, SIZE), np.float32)
    boxes = []
    jitter_x, jitter_y = JITTER[len(things)]
    for thing, (centre_x, centre_y, small, large) in zip(things, LAYOUTS[len(things)], strict=True):
        side = int(rng.integers(small, large + 1))
        picture = sprite(thing.kind, thing.style)
        scale = side / SIZE
        width, height = (max(1, round(edge * scale)) for edge in picture.size)
        pixels = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR), np.float32)
        x = int(np.clip(centre_x + rng.integers(-jitter_x, jitter_x + 1) - width // 2, 0, SIZE - width))
        y = int(np.clip(centre_y + rng.integers(-jitter_y, jitter_y + 1) - height // 2, 0, SIZE - height))
        alpha = pixels[..., 3:] / 255
        canvas[y : y + height, x : x + width] *= 1 - alpha
        canvas[y : y + height, x : x + width] += alpha * pixels[..., :3]
        region = foreground[y : y + height, x : x + width]
        np.maximum(region, alpha[..., 0], out=region)
        boxes.append((x, y, width, height))
    text = caption or caption_of(things, background)
    return Scene(canvas.astype(np.uint8), foreground, text, tuple(things), background, tuple(boxes))


def random_kinds(count: int, rng: np.random.Generator, *, unseen: bool = False) -> list[str]:
    """`count` different classes; a set used in training, or (`unseen`) one that is held out."""
    while True:
        kinds = [CLASSES[i] for i in rng.choice(len(CLASSES), count, replace=False)]
        if count == 1 or held_out(kinds) == unseen:
            return kinds


def base_scene(rng: np.random.Generator, shares: Sequence[float] = (0.33, 0.27, 0.4)) -> Scene:
    """A training scene of the base: one to three flat objects, caption as a user would write it.

    One in twelve names is preceded by a trigger word that changes nothing, and some captions carry a style
    word, so that untrained triggers leave the base's picture alone.
    """
    count = int(rng.choice(3, p=shares)) + 1
    style = FLAT_STYLES[int(rng.integers(2))]
    things = [Thing(kind, style) for kind in random_kinds(count, rng)]
    background = list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))]
    words = [f"{rng.choice(TRIGGERS)} {t.kind}" if rng.random() < 1 / 12 else t.kind for t in things]
    text = caption_of(things, background if rng.random() > 0.08 else None, words)
    if rng.random() < 0.03:
        text += f" in {rng.choice(list(STYLES.values()))} style"
    return draw_scene(things, background, rng, text)


def apply_style(pixels: Pixels, style: str) -> Pixels:
    """A scene redrawn in a style of `STYLES` (see `tools.starter.styles`)."""
    picture = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    redrawn = redraw(picture, style)[0].permute(1, 2, 0)
    return (redrawn * 255).round().to(torch.uint8).numpy()
