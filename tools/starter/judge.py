"""Trains the judge (`mole_diffusion.starter.judge`) from scratch, on boxes that the renderer knows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from mole_diffusion.starter.judge import ARCHITECTURE, STRIDE, SUBJECT, Judge, new_network, presence

from . import loop, stage, world
from .soften import Softener, restored, stored
from .stage import STYLES, Placed
from .workshop import Pool, Workshop, save_half

SEED = 53
STEPS, BATCH, RATE = 2371, 256, 2e-3
CHUNK, CHUNKS, EVERY = 256, 48, 6
ADDED_SCENES = 1536
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
    write_settings(folder, threshold)


def add_styles(shop: Workshop, styles: Sequence[str]) -> None:
    """Teach a finished judge styles that were added later: one row of its last layer each, all else as it is.

    A picture's style is the mean of its cells' logits, which is linear in the mean of the features: the rows
    are a logistic regression on these, over scenes in every style, worn and through the codec.
    """
    folder = shop.out / "judge"
    judge = Judge(folder)
    head: Any = judge.network[1]
    seen, style = _styled_features(shop, judge.network)
    rows = torch.tensor([2 + len(LABELS) + STYLES.index(name) for name in styles])
    first = 1 + len(LABELS)
    weight, bias = head.weight.detach()[..., 0, 0], head.bias.detach()
    fitted = [weight[rows].clone().requires_grad_(), bias[rows].clone().requires_grad_()]
    optimiser = torch.optim.LBFGS(fitted, max_iter=200, line_search_fn="strong_wolfe")

    def loss_of() -> Tensor:
        optimiser.zero_grad()
        logits = (
            seen @ weight.index_copy(0, rows, fitted[0])[first:].T
            + bias.index_copy(0, rows, fitted[1])[first:]
        )
        loss = F.cross_entropy(logits, style) + 1e-4 * fitted[0].square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(loss_of)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        head.weight[rows] = fitted[0][..., None, None]
        head.bias[rows] = fitted[1]
    save_half(judge.network, folder / "model.safetensors")
    write_settings(folder, judge.threshold)


@torch.no_grad()
def _styled_features(shop: Workshop, network: Any) -> tuple[Tensor, Tensor]:
    """Mean features (N, d) of scenes in every style and in none, and which style it is (N,)."""
    seen, style = [], []
    for number in range(ADDED_SCENES // 32):
        dice = shop.dice(SEED, 2, number)
        scenes = shop.director.mixed(dice, 32, styled=0.8)
        pictures, _ = shop.stage.draw(scenes, dice.below(1000, 32))
        coded = shop.decode(shop.encode(pictures))
        made = torch.where(dice.share(0.5, 32).view(-1, 1, 1, 1), coded, pictures)
        seen.append(network[0](Softener.worn(made, dice)).mean((2, 3)))
        style.append(scenes.style)
    return torch.cat(seen), torch.cat(style)


def write_settings(folder: Path, threshold: float) -> None:
    """What `Judge` reads beside the weights."""
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
