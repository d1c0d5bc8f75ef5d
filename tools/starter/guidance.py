"""The starter's two CLIPs in open_clip's format: one guides trainings, the other only scores pictures.

A picture that was optimised against a CLIP fools that CLIP first. So the second one shares nothing with the
first but the world: a convolutional picture encoder in place of a transformer, a seed and scenes of its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from open_clip import CLIP
from torch import Tensor

from . import loop, text, world
from .scenes import Dice
from .soften import Softener, restored, stored
from .stage import NO_COLOUR, SUBJECT, Placed
from .workshop import Pool, Workshop, save_half

CHUNK, CHUNKS, EVERY = 256, 40, 6


@dataclass(frozen=True)
class Recipe:
    """One CLIP: folder in the starter, seed, steps, batch, rate, layers of text, open_clip's `vision_cfg`."""

    name: str
    seed: int
    steps: int
    batch: int
    rate: float
    text_layers: int
    vision: Mapping[str, object]


GUIDE = Recipe(
    "clip", 71, 1615, 384, 8e-4, 3, {"layers": 6, "width": 192, "head_width": 32, "patch_size": 16}
)
SCORER = Recipe(
    "clip_eval",
    72,
    1033,
    384,
    1e-3,
    2,
    {"timm_model_name": "regnetx_002", "timm_pool": "avg", "timm_proj": "linear"},
)


def model_config(recipe: Recipe, vocabulary: int) -> dict[str, Any]:
    """open_clip's `model_cfg`."""
    return {
        "embed_dim": 128,
        "vision_cfg": {"image_size": world.SIZE, **recipe.vision},
        "text_cfg": {
            "context_length": text.MAX_TOKENS,
            "vocab_size": vocabulary,
            "width": 128,
            "heads": 4,
            "layers": recipe.text_layers,
            "hf_tokenizer_name": "tokenizer",
        },
    }


@dataclass
class Described:
    """Scenes with the words that describe them: colours by index or NO_COLOUR, and who is called glossy."""

    scenes: Placed
    colour: Tensor
    glossy: Tensor


def describe(shop: Workshop, scenes: Placed, dice: Dice) -> Described:
    """Words for scenes: a colour where an object has one, "glossy 3d" for the three-dimensional drawings."""
    count = len(scenes.count)
    own = shop.stage.colours[shop.stage.index(scenes.kind, scenes.drawing, scenes.hue)]
    # A drawn style has lost the colours; and half of the captions do without.
    told = (dice.share(0.6, count) & (scenes.style == 0))[:, None] & dice.share(0.85, count, 3)
    glossy = (scenes.drawing == SUBJECT) & dice.share(0.7, count, 1)
    return Described(scenes, torch.where(told, own, NO_COLOUR), glossy)


def caption(shop: Workshop, described: Described, place: Tensor) -> Tensor:
    """Phrase numbers of a description, (B, P); `place` (B,) tells whether the background is named."""
    scenes = described.scenes
    return shop.captions.compose(
        scenes,
        before=torch.zeros_like(scenes.kind),
        colour=described.colour,
        glossy=described.glossy,
        place=place,
        style=scenes.style,
        described=True,
    )


def _slot(dice: Dice, count: Tensor) -> Tensor:
    """A random object of each scene, as a mask (B, 3)."""
    chosen = (dice.uniform(len(count)) * count).long()
    return torch.arange(3, device=count.device)[None] == chosen[:, None]


def _other_kinds(scenes: Placed, dice: Dice) -> Tensor:
    """For each scene a class that it does not show, (B,)."""
    lots = dice.uniform(len(scenes.count), len(world.CLASSES))
    return lots.scatter(1, scenes.kind, -1.0).argmax(1)


def two_colours(described: Described) -> Tensor:
    """Scenes whose first two objects are called by different colours, (B,)."""
    first, second = described.colour[:, 0], described.colour[:, 1]
    return (described.scenes.count >= 2) & (first >= 0) & (second >= 0) & (first != second)


def exchanged(described: Described, dice: Dice) -> Described:
    """The description with one object replaced by one that is not there."""
    scenes = described.scenes
    kind = torch.where(_slot(dice, scenes.count), _other_kinds(scenes, dice)[:, None], scenes.kind)
    return replace(described, scenes=replace(scenes, kind=kind))


def colours_swapped(described: Described) -> Described:
    """The description with the colours of its first two objects exchanged."""
    return replace(described, colour=described.colour[:, [1, 0, 2]])


def wrongly_told(described: Described, dice: Dice, swapped_share: float = 0.6) -> Described:
    """A description of something else: the colours of two objects exchanged, in a share of scenes where they
    differ; else an object.
    """
    swap = two_colours(described) & dice.share(swapped_share, len(described.scenes.count))
    other, swapped = exchanged(described, dice), colours_swapped(described)
    kind = torch.where(swap[:, None], described.scenes.kind, other.scenes.kind)
    return replace(
        described,
        scenes=replace(described.scenes, kind=kind),
        colour=torch.where(swap[:, None], swapped.colour, described.colour),
    )


def wrongly_drawn(described: Described, dice: Dice) -> tuple[Placed, Tensor]:
    """Scenes that do not fit their description, and which of them have two objects merged, (B,).

    One object is another class, one is missing, two are drawn over one another, or two have exchanged hues.
    """
    scenes = described.scenes
    several = scenes.count >= 2
    lot = dice.uniform(len(scenes.count))
    missing, merged = several & (lot < 0.25), several & (lot >= 0.25) & (lot < 0.5)
    swapped = two_colours(described) & (scenes.hue[:, 0] != scenes.hue[:, 1]) & (lot >= 0.5) & (lot < 0.8)
    replaced = ~(missing | merged | swapped)
    slot = _slot(dice, scenes.count)
    kind = torch.where(slot & replaced[:, None], _other_kinds(scenes, dice)[:, None], scenes.kind)
    hue = torch.where(swapped[:, None], scenes.hue[:, [1, 0, 2]], scenes.hue)
    # The missing object changes places with the last, which is left out.
    last = torch.arange(3, device=kind.device)[None] == (scenes.count - 1)[:, None]
    order = torch.arange(3, device=kind.device).expand(len(kind), 3).clone()
    gone = slot.to(torch.uint8).argmax(1)
    order = torch.where(missing[:, None] & slot, (scenes.count - 1)[:, None], order)
    order = torch.where(missing[:, None] & last, gone[:, None], order)
    near = merged[:, None] & (torch.arange(3, device=kind.device) == 1)
    x = torch.where(near, scenes.x[:, :1] + 4, scenes.x)
    y = torch.where(near, scenes.y[:, :1] - 3, scenes.y)
    moved = {
        name: value.gather(1, order)
        for name, value in {
            "kind": kind,
            "hue": hue,
            "drawing": scenes.drawing,
            "side": scenes.side,
            "x": x,
            "y": y,
        }.items()
    }
    return replace(scenes, count=scenes.count - missing.long(), **moved), merged


def rows_of(
    shop: Workshop, described: Described, dice: Dice, softener: Softener | None, swapped_share: float = 0.6
) -> loop.Batch:
    """Pictures of scenes, wrong pictures, their description and a wrong one.

    Args:
        softener: makes pictures as generators do; None leaves them as rendered.
        swapped_share: see `wrongly_told`.
    """
    scenes, count = described.scenes, len(described.scenes.count)
    place, variety = dice.share(0.8, count), dice.below(1000, count)
    ids, wrong_ids = (
        shop.captions.tokens(caption(shop, one, place))
        for one in (described, wrongly_told(described, dice, swapped_share))
    )
    pictures, _ = shop.stage.draw(scenes, variety)
    changed, merged = wrongly_drawn(described, dice)
    wrong, _ = shop.stage.draw(changed, variety, merged)
    if softener is not None:
        plain = {"before": torch.zeros_like(scenes.kind), "style": torch.zeros_like(scenes.style)}
        base_ids = shop.captions.tokens(shop.captions.compose(scenes, place=place, **plain))
        pictures, wrong = (softener.generated(one, base_ids, dice, scenes.style) for one in (pictures, wrong))
    return {"picture": stored(pictures), "wrong": stored(wrong), "ids": ids, "wrong_ids": wrong_ids}


def described_rows(shop: Workshop, seed: int) -> Pool:
    """Pictures, wrong pictures, their description and a wrong one."""
    softener = Softener(shop)

    def make(number: int, count: int) -> loop.Batch:
        dice = shop.dice(seed, number)
        scenes = shop.director.mixed(dice, count, recoloured=0.5, styled=0.12)
        return rows_of(shop, describe(shop, scenes, dice), dice, softener)

    return Pool(make, shop.amount(CHUNK), shop.amount(CHUNKS), EVERY)


def train_clip(shop: Workshop, recipe: Recipe = GUIDE) -> None:
    """Contrastive training (Radford et al. 2021) with wrong captions and pictures as extra negatives."""
    torch.manual_seed(recipe.seed)
    settings = model_config(recipe, len(shop.tokenizer))
    arguments = {k: v for k, v in settings["text_cfg"].items() if k != "hf_tokenizer_name"}
    clip = CLIP(embed_dim=128, vision_cfg=settings["vision_cfg"], text_cfg=arguments).to(shop.device).train()
    pool, size = described_rows(shop, recipe.seed), shop.amount(recipe.batch)
    target = torch.arange(size, device=shop.device)

    def make(step: int) -> loop.Batch:
        dice = shop.dice(recipe.seed, 1, step)
        rows = pool.sample(step, size, dice)
        pictures = torch.cat([rows.pop("picture"), rows.pop("wrong")[: size // 2]])
        ids = torch.cat([rows.pop("ids"), rows.pop("wrong_ids")])
        return {"picture": Softener.worn(restored(pictures), dice), "ids": ids}

    def loss_of(batch: loop.Batch) -> Tensor:
        return contrastive(logits_of(shop, clip, batch), target)

    loop.train(
        recipe.name,
        shop.work,
        clip,
        make,
        loss_of,
        steps=shop.steps(recipe.steps),
        rate=recipe.rate,
        decay=0.05,
        average=0.998,
        graph=shop.graph,
    )
    save_clip(shop, recipe, clip)


def logits_of(shop: Workshop, clip: CLIP, batch: loop.Batch) -> Tensor:
    """(pictures, captions) the CLIP's logits of a batch."""
    with shop.mixed_precision():
        image, words = clip.encode_image(batch["picture"]), clip.encode_text(batch["ids"])
    image, words = F.normalize(image.float(), dim=-1), F.normalize(words.float(), dim=-1)
    logits: Tensor = clip.logit_scale.exp().clamp(max=100) * image @ words.T
    return logits


def contrastive(logits: Tensor, target: Tensor) -> Tensor:
    """The loss of Radford et al. 2021; right pictures and captions come first, in the order of `target`."""
    size = len(target)
    return (F.cross_entropy(logits[:size], target) + F.cross_entropy(logits[:, :size].T, target)) / 2


def save_clip(shop: Workshop, recipe: Recipe, clip: CLIP) -> None:
    """Write a CLIP into the starter, in open_clip's format, with the starter's tokenizer."""
    settings = model_config(recipe, len(shop.tokenizer))
    folder = shop.out / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    save_half(clip, folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    document = {"model_cfg": settings, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(document, indent=1) + "\n")
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shop.out / "tokenizer" / name, folder / name)
