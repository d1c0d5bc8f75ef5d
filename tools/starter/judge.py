"""Trains the judge (`mole_diffusion.starter.judge`) from scratch, on boxes that the renderer knows."""

from __future__ import annotations

import json

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from mole_diffusion.starter.judge import ARCHITECTURE, STRIDE, SUBJECT, new_network, presence

from . import loop, stage, world
from .soften import Softener, restored, stored
from .stage import STYLES, Placed
from .workshop import Pool, Workshop, save_half

SEED = 53
STEPS, BATCH, RATE = 2371, 256, 2e-3
CHUNK, CHUNKS, EVERY = 256, 48, 6
CELLS = 8
LABELS = (*world.CLASSES, *(f"{SUBJECT}{name}" for name in world.SUBJECTS))
"""What a cell can be (beside nothing): a class in a flat drawing, or an expert's own subject."""
_SUBJECT_LABEL = [
    len(world.CLASSES) + list(world.SUBJECTS).index(kind) if kind in world.SUBJECTS else number
    for number, kind in enumerate(world.CLASSES)
]


def random_scene(rng: np.random.Generator) -> world.Scene:
    """One to three objects of any classes: all flat, all subjects, or mixed."""
    count = int(rng.choice([1, 2, 3], p=[0.25, 0.25, 0.5]))
    kinds = [world.CLASSES[i] for i in rng.choice(len(world.CLASSES), count, replace=False)]
    mixed = rng.random()
    things = []
    for kind in kinds:
        subject = kind in world.SUBJECTS and rng.random() < (
            0.0 if mixed < 0.3 else 1.0 if mixed > 0.7 else 0.5
        )
        things.append(
            world.Thing(kind, world.SUBJECT_STYLE if subject else world.FLAT_STYLES[int(rng.integers(2))])
        )
    return world.draw_scene(things, list(world.BACKGROUNDS)[int(rng.integers(len(world.BACKGROUNDS)))], rng)


def target_of(scene: world.Scene) -> Tensor:
    """Labels (len(LABELS),) of a scene, 0 or 1."""
    shown = {thing.kind for thing in scene.things}
    shown |= {f"{SUBJECT}{thing.kind}" for thing in scene.things if thing.style == world.SUBJECT_STYLE}
    return torch.tensor([float(label in shown) for label in LABELS])


def labels_of(scenes: Placed) -> Tensor:
    """Index into LABELS of every object, (B, 3)."""
    subject = torch.tensor(_SUBJECT_LABEL, device=scenes.kind.device)[scenes.kind]
    return torch.where(scenes.drawing == stage.SUBJECT, subject, scenes.kind)


def cells_of(labels: Tensor, boxes: Tensor, count: Tensor) -> Tensor:
    """What each cell shows, (B, CELLS, CELLS): 0 nothing, 1 + index into LABELS, -1 at the rim of an object.

    Args:
        labels: index into LABELS, (B, 3).
        boxes: centre x, centre y, width, height in pixels, (B, 3, 4).
        count: objects, (B,).
    """
    centre = (torch.arange(CELLS, device=labels.device) + 0.5) * STRIDE
    cells = torch.zeros(len(labels), CELLS, CELLS, dtype=torch.long, device=labels.device)
    for slot in range(3):
        x, y, width, height = (boxes[:, slot, part, None] for part in range(4))
        across, down = (centre - x).abs() / (width / 2), (centre - y).abs() / (height / 2)
        off = torch.maximum(down[:, :, None], across[:, None])
        there = (slot < count)[:, None, None]
        cells = torch.where(there & (off < 1.2), -1, cells)
        # At least the cell nearest to the middle, however thin the object.
        reach = off.amin((1, 2), keepdim=True).clamp(min=0.6)
        cells = torch.where(there & (off <= reach), 1 + labels[:, slot, None, None], cells)
    return cells


def blurred(pixels: np.ndarray, radius: float) -> np.ndarray:
    """Gaussian blur in pixels."""
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


def judged_rows(shop: Workshop, seed: int) -> Pool:
    """Softened pictures of everything, a quarter in a style, with what their cells show."""
    softener = Softener(shop)

    def make(number: int, count: int) -> loop.Batch:
        dice = shop.dice(seed, number)
        scenes = shop.director.mixed(dice, count, styled=0.25)
        pictures, _ = shop.stage.draw(scenes, dice.below(1000, count))
        named = torch.ones_like(scenes.count).bool()
        caption = shop.captions.compose(
            scenes, before=torch.zeros_like(scenes.kind), place=named, style=scenes.style
        )
        soft = softener.generated(pictures, shop.captions.tokens(caption), dice, scenes.style)
        return {
            "picture": stored(soft),
            "cells": cells_of(labels_of(scenes), shop.stage.boxes(scenes), scenes.count),
            "style": scenes.style,
        }

    return Pool(make, shop.amount(CHUNK), shop.amount(CHUNKS), EVERY)


def train_judge(shop: Workshop) -> None:
    """Train, then set the threshold where precision and recall over new degraded scenes are most equal."""
    torch.manual_seed(SEED)
    network = new_network(len(LABELS), len(STYLES)).to(shop.device).train()
    pool, size = judged_rows(shop, SEED), shop.amount(BATCH)

    def make(step: int) -> loop.Batch:
        dice = shop.dice(SEED, 1, step)
        rows = pool.sample(step, size, dice)
        rows["picture"] = Softener.worn(restored(rows["picture"]), dice)
        return rows

    def loss_of(batch: loop.Batch) -> Tensor:
        with shop.mixed_precision():
            logits = network(batch["picture"]).float()
        cells, styles = logits[:, : 1 + len(LABELS)], logits[:, 1 + len(LABELS) :].mean((2, 3))
        of_cells = F.cross_entropy(cells, batch["cells"], ignore_index=-1)
        return of_cells + 0.2 * F.cross_entropy(styles, batch["style"])

    loop.train(
        "judge",
        shop.work,
        network,
        make,
        loss_of,
        steps=shop.steps(STEPS),
        rate=RATE,
        decay=0.05,
        average=0.995,
        graph=shop.graph,
    )
    network.eval()
    scores, target = [], []
    with torch.no_grad():
        for number in range(4):
            rows = make(10**6 + number)
            scores.append(presence(network(rows["picture"]), LABELS))
            target.append(_present(rows["cells"]))
    threshold = best_threshold(torch.cat(scores), torch.cat(target))
    folder = shop.out / "judge"
    folder.mkdir(parents=True, exist_ok=True)
    save_half(network, folder / "model.safetensors")
    settings = {"architecture": ARCHITECTURE, "labels": LABELS, "styles": STYLES, "threshold": threshold}
    (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")


def _present(cells: Tensor) -> Tensor:
    """Labels (B, labels) that stand in cells; a subject counts as its class too."""
    shown = torch.stack([(cells == 1 + number).any(-1).any(-1) for number in range(len(LABELS))], 1)
    for number in range(len(world.CLASSES), len(LABELS)):
        shown[:, LABELS.index(LABELS[number].removeprefix(SUBJECT))] |= shown[:, number]
    return shown


def best_threshold(scores: Tensor, target: Tensor) -> float:
    """Where precision and recall are most equal, in 0.2..0.98."""
    thresholds = torch.linspace(0.2, 0.98, 40)
    gaps = []
    for threshold in thresholds.tolist():
        found = scores > threshold
        hits = (found & target).sum()
        gaps.append(abs(float(hits / found.sum().clamp(min=1) - hits / target.sum())))
    return round(float(thresholds[int(np.argmin(gaps))]), 3)
