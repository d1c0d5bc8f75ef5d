"""How often the starter's CLIPs prefer what a picture shows to what it does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor

from mole_diffusion.starter.judge import to_tensor

from . import guidance, world
from .stage import COLOURS, HUES, NO_COLOUR, colour_of
from .workshop import Workshop

NAMES = ("clip", "clip_eval")
#: Makes one picture for each prompt.
Draw = Callable[[Sequence[str]], Sequence[Image.Image]]


def scores(out: Path, draw: Draw) -> dict[str, dict[str, Any]]:
    """Of both CLIPs, on rendered scenes and on pictures that the base drew."""
    drawn = drawn_pairs(draw)
    return {
        name: {**clip_scores(out, name), "generated": generated_scores(out, name, *drawn)} for name in NAMES
    }


def clip_scores(out: Path, folder: str, count: int = 400, *, colours: bool = True) -> dict[str, float]:
    """How often a CLIP prefers a scene's description to a wrong one.

    Wrong is one object exchanged, or the colours of the first two objects, of scenes that have two.

    Args:
        colours: half of the scenes are recoloured, and descriptions name colours.
    """
    shop = Workshop(out, out, torch.device("cpu"), hues=HUES if colours else 1)

    def words(told: guidance.Described) -> list[str]:
        return shop.captions.text(guidance.caption(shop, told, place))

    dice = shop.dice(99, 5)
    scenes = shop.director.mixed(dice, count, recoloured=0.5)
    described = guidance.describe(shop, scenes, dice)
    if not colours:
        described.colour.fill_(NO_COLOUR)
    pictures, _ = shop.stage.draw(scenes, dice.below(1000, count), plain=True)
    place = torch.ones(count, dtype=torch.bool)
    told = {
        "right": words(described),
        "object": words(guidance.exchanged(described, dice)),
        "colours": words(guidance.colours_swapped(described)),
    }
    near = _near(out, folder, pictures * 2 - 1, told)
    two = guidance.two_colours(described)
    return {
        "object": float((near["right"] > near["object"]).float().mean()),
        "colours": float((near["right"] > near["colours"])[two].float().mean()),
    }


def drawn_pairs(draw: Draw, count: int = 100) -> tuple[Tensor, dict[str, list[str]]]:
    """Pictures (n, 3, H, W) in -1..1 of two objects that the base drew, and what is told of them.

    Objects are those that are of one colour in both of the styles that the base knows, and each pair has two.

    Args:
        draw: the base.
        count: n.
    Returns:
        The pictures; and captions by kind: "right", with an exchanged "object", with exchanged "colours".
    """
    known = {
        kind: {colour_of(world.sprite(kind, style)) for style in world.FLAT_STYLES} for kind in world.CLASSES
    }
    named = {
        kind: COLOURS[index]
        for kind, found in known.items()
        if len(found) == 1 and (index := min(found)) != NO_COLOUR
    }
    rng, prompts = np.random.default_rng([99, 10]), []
    told: dict[str, list[str]] = {"right": [], "object": [], "colours": []}
    while len(prompts) < count:
        first, second, other = (str(kind) for kind in rng.choice(list(named), 3, replace=False))
        if named[first] == named[second]:
            continue
        place = list(world.BACKGROUNDS)[len(prompts) % len(world.BACKGROUNDS)]
        things = [world.Thing(first, "noto"), world.Thing(second, "noto")]
        one, two = named[first], named[second]
        prompts.append(world.caption_of(things, place))
        for name, words in {
            "right": (f"{one} {first}", f"{two} {second}"),
            "object": (f"{one} {other}", f"{two} {second}"),
            "colours": (f"{two} {first}", f"{one} {second}"),
        }.items():
            told[name].append(world.caption_of(things, place, words))
    return to_tensor(np.stack([np.asarray(picture.convert("RGB")) for picture in draw(prompts)])), told


def generated_scores(
    out: Path, folder: str, pictures: Tensor, told: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """As `clip_scores`, of what `drawn_pairs` gives."""
    near = _near(out, folder, pictures, told)
    return {name: float((near["right"] > near[name]).float().mean()) for name in ("object", "colours")}


@torch.no_grad()
def _near(out: Path, folder: str, pictures: Tensor, told: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
    """By kind of caption (n,) how near pictures (n, 3, H, W) in -1..1 are to their captions."""
    network = open_clip.create_model(f"local-dir:{out / folder}").eval()
    tokenise = open_clip.get_tokenizer(f"local-dir:{out / folder}")
    image = torch.cat([network.encode_image(part, normalize=True) for part in pictures.split(50)])
    return {
        name: (image * network.encode_text(tokenise(list(captions)), normalize=True)).sum(1)
        for name, captions in told.items()
    }
