"""A style expert that is trained by itself, on a processor as well: twenty minutes on one core.

The same base, loss and layers as the experts that are trained side by side, with a fixed set of scenes that
is drawn once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from . import base, expert, loop, world
from .scenes import Dice
from .stage import STYLES, SUBJECT
from .workshop import Workshop

SEED = 43
STEPS, RATE = 1000, 2e-3
OWN, PRIOR = 10, 4
"""Scenes in the style in a batch, and ordinary ones beside them (prior preservation)."""
SCENES, PRIORS = 480, 160
_DRAWN_AT_ONCE = 32


def train_style(shop: Workshop, name: str) -> None:
    """Train the style's expert; write its LoRA file, its row in the catalogue and its reference pictures."""
    torch.manual_seed(SEED)
    unet, encoder = base.load_unet(shop.out), base.load_text_encoder(shop.out)
    factors = {
        "unet": expert.attach(unet, expert.UNET_TARGETS, 1),
        "text_encoder": expert.attach(encoder, expert.TEXT_TARGETS, 1),
    }
    module = nn.ModuleDict({"unet": unet, "text_encoder": encoder})
    module.to(shop.device, memory_format=torch.channels_last)
    own = scenes(shop, name, shop.amount(SCENES), SEED, 1, 1 + STYLES.index(name))
    ordinary = scenes(shop, None, shop.amount(PRIORS), SEED, 1, 0)
    noise = base.Noise(shop.device)

    def make(step: int) -> loop.Batch:
        dice = shop.dice(SEED, 2, step)
        return noise.batch(mixed(own, ordinary, dice, OWN, PRIOR), dice, 1)

    loop.train(
        name,
        shop.work,
        module,
        make,
        base.denoising(shop, module, emphasis=0.0),
        steps=shop.steps(STEPS),
        rate=RATE,
        decay=0.0,
        checkpoint_every=100,
        graph=shop.graph,
        clip=None,
    )
    expert.write_expert(shop.out, name, expert.of_one(factors, 0))
    expert.write_references(name, shop.out)
    expert.write_catalogue(shop.out, (name,))


def mixed(own: loop.Batch, ordinary: loop.Batch, dice: Dice, mine: int, prior: int) -> loop.Batch:
    """So many rows of an expert's own scenes and of ordinary ones."""
    picked = dice.below(len(own["ids"]), mine), dice.below(len(ordinary["ids"]), prior)
    # Timesteps are spread in order over the batch, so its examples are shuffled.
    order = dice.uniform(mine + prior).argsort()
    return {key: torch.cat([own[key][picked[0]], ordinary[key][picked[1]]])[order] for key in own}


def scenes(shop: Workshop, name: str | None, count: int, *seed: int) -> loop.Batch:
    """Latents, cover and captions of `count` scenes with the subject or in the style; None: ordinary ones."""
    parts = []
    for first in range(0, count, _DRAWN_AT_ONCE):
        size = min(_DRAWN_AT_ONCE, count - first)
        dice = shop.dice(*seed, first)
        if name in world.SUBJECTS:
            kind = torch.full((size,), world.CLASSES.index(name), device=shop.device)
            placed = shop.director.of_subject(dice, kind)
        else:
            placed = shop.director.ordinary(dice, size)
        if name in world.STYLES:
            placed.style = torch.full_like(placed.count, 1 + STYLES.index(name))
        pictures, cover = shop.stage.draw(placed, dice.below(1000, size))
        trigger = torch.where(placed.drawing == SUBJECT, shop.captions.own_trigger[placed.kind], 0)
        named = dice.share(0.95, size)
        caption = shop.captions.compose(placed, before=trigger, place=named, style=placed.style)
        parts.append(
            {
                "latents": shop.encode(pictures),
                "cover": F.avg_pool2d(torch.ones_like(cover) if name in world.STYLES else cover, 8),
                "ids": shop.captions.tokens(caption),
            }
        )
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
