"""A second round of the guidance CLIP: whose colour is whose, where two objects have different ones.

The first round saw two coloured objects in few of its scenes, and told exchanged colours in nine of ten.
Three quarters of the scenes are such here.
"""

from __future__ import annotations

from dataclasses import fields

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from . import loop
from .guidance import GUIDE, Described, contrastive, describe, logits_of, rows_of, save_clip, two_colours
from .scenes import Dice
from .soften import Softener, restored
from .stage import Placed
from .workshop import Pool, Workshop

STEPS, BATCH, RATE, SEED = 400, 192, 4e-4, 171
#: Of the scenes with two colours, so many are told with the colours exchanged.
SWAPPED = 0.7
#: Rows that are made at once, such chunks that are held, every which step one is new: as rendered, and as
#: generated, which costs more.
RENDERED, GENERATED = (96, 24, 2), (48, 16, 60)


def coloured_scenes(shop: Workshop, dice: Dice, count: int) -> Described:
    """Scenes and their words; in three quarters the first two objects are called by different colours."""
    scenes = shop.director.mixed(dice, count * 4, recoloured=0.6, styled=0.05)
    described = describe(shop, scenes, dice)
    two = two_colours(described)
    order = two.to(torch.uint8).argsort(descending=True, stable=True)
    with_two = min(int(two.sum()), count * 3 // 4)
    keep = torch.cat([order[:with_two], order[with_two - count :]])
    kept = Placed(**{one.name: getattr(scenes, one.name)[keep] for one in fields(Placed)})
    return Described(kept, described.colour[keep], described.glossy[keep])


def coloured_rows(shop: Workshop, seed: int, softener: Softener | None) -> Pool:
    """As `guidance.described_rows`; as rendered where there is no softener."""

    def make(number: int, count: int) -> loop.Batch:
        dice = shop.dice(seed, number)
        return rows_of(shop, coloured_scenes(shop, dice, count), dice, softener, SWAPPED)

    chunk, chunks, every = RENDERED if softener is None else GENERATED
    return Pool(make, shop.amount(chunk), shop.amount(chunks), every)


def train_colours(shop: Workshop) -> None:
    """Go on with the guidance CLIP that is there."""
    clip = open_clip.create_model(f"local-dir:{shop.out / GUIDE.name}").to(shop.device).train()
    rendered = coloured_rows(shop, SEED, None)
    generated = coloured_rows(shop, SEED + 1, Softener(shop))
    size = shop.amount(BATCH)
    generated_size = size // 3
    target = torch.arange(size, device=shop.device)

    def make(step: int) -> loop.Batch:
        dice = shop.dice(SEED, 1, step)
        parts = [
            rendered.sample(step, size - generated_size, dice),
            generated.sample(step, generated_size, dice),
        ]
        rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        pictures = torch.cat([rows["picture"], rows["wrong"][::2]])
        ids = torch.cat([rows["ids"], rows["wrong_ids"]])
        return {"picture": Softener.worn(restored(pictures), dice), "ids": ids}

    def loss_of(batch: loop.Batch) -> Tensor:
        logits = logits_of(shop, clip, batch)
        # Also each picture's own wrong caption against its right one, which are two among hundreds above.
        pair = F.softplus(logits[target, target + size] - logits[target, target]).mean()
        return contrastive(logits, target) + pair

    loop.train(
        "clip-colours",
        shop.work,
        clip,
        make,
        loss_of,
        steps=shop.steps(STEPS),
        rate=RATE,
        decay=0.05,
        average=0.99,
        checkpoint_every=50,
        graph=shop.graph,
    )
    save_clip(shop, GUIDE, clip)
