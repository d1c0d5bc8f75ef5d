"""A style expert that is trained by itself, on a processor as well: twenty minutes on one core.

The same base, loss and layers as the experts that are trained side by side, with a fixed set of scenes that
is drawn once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from . import base, expert, loop
from .stage import STYLES
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
    number = 1 + STYLES.index(name)
    own = scenes(shop, number, shop.amount(SCENES))
    ordinary = scenes(shop, 0, shop.amount(PRIORS))
    noise = base.Noise(shop.device)

    def make(step: int) -> loop.Batch:
        dice = shop.dice(SEED, 2, step)
        mine = dice.below(len(own["ids"]), OWN)
        prior = dice.below(len(ordinary["ids"]), PRIOR)
        # Timesteps are spread in order over the batch, so its examples are shuffled.
        order = dice.uniform(OWN + PRIOR).argsort()
        rows = {key: torch.cat([own[key][mine], ordinary[key][prior]])[order] for key in own}
        return noise.batch(rows, dice, 1)

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


def scenes(shop: Workshop, style: int, count: int) -> loop.Batch:
    """Latents, cover and captions of `count` ordinary scenes, all in one style; 0 is as drawn."""
    parts = []
    for first in range(0, count, _DRAWN_AT_ONCE):
        size = min(_DRAWN_AT_ONCE, count - first)
        dice = shop.dice(SEED, 1, style, first)
        flat = shop.director.ordinary(dice, size)
        flat.style = torch.full_like(flat.count, style)
        pictures, cover = shop.stage.draw(flat, dice.below(1000, size))
        named = dice.share(0.95, size)
        caption = shop.captions.compose(
            flat, before=torch.zeros_like(flat.kind), place=named, style=flat.style
        )
        parts.append(
            {
                "latents": shop.encode(pictures),
                "cover": F.avg_pool2d(torch.ones_like(cover) if style else cover, 8),
                "ids": shop.captions.tokens(caption),
            }
        )
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
