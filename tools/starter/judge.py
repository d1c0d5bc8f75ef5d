"""Trains the judge (`mole_diffusion.starter.judge`) from scratch, on boxes that the renderer knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from safetensors.torch import save_file
from torch import Tensor

from mole_diffusion.starter.judge import ARCHITECTURE, STRIDE, SUBJECT, new_network, presence, to_tensor

from . import base, loop, world

SEED = 53
STEPS, BATCH, RATE = 600, 48, 2e-3
CELLS = 8
LABELS = (*world.CLASSES, *(f"{SUBJECT}{name}" for name in world.SUBJECTS))
"""What a cell can be (beside nothing): a class in a flat drawing, or an expert's own subject."""


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


def cells_of(scene: world.Scene) -> Tensor:
    """What each cell shows, (CELLS, CELLS): 0 nothing, 1 + index into LABELS, -1 at the rim of an object."""
    centre = (np.arange(CELLS) + 0.5) * STRIDE
    cells = np.zeros((CELLS, CELLS), np.int64)
    for thing, (x, y, width, height) in zip(scene.things, scene.boxes, strict=True):
        name = f"{SUBJECT}{thing.kind}" if thing.style == world.SUBJECT_STYLE else thing.kind
        off_x = np.abs(centre - (x + width / 2)) / (width / 2)
        off_y = np.abs(centre - (y + height / 2)) / (height / 2)
        off = np.maximum(off_y[:, None], off_x[None])
        cells[off < 1.2] = -1
        # At least the cell nearest to the middle, however thin the object.
        cells[off <= max(0.6, off.min())] = 1 + LABELS.index(name)
    return torch.from_numpy(cells)


def blurred(pixels: np.ndarray, radius: float) -> np.ndarray:
    """Gaussian blur in pixels."""
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


def degrade(pixels: np.ndarray, rng: np.random.Generator, vae: Any) -> Tensor:
    """What a generator does to pictures: a third pass the codec with noisy latents; half lose detail."""
    picture = to_tensor(pixels)
    if vae is not None:
        part = torch.from_numpy(rng.random(len(pixels)) < 0.34)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            latents = vae.encode(picture[part]).latent_dist.mode()
            noise = torch.from_numpy(rng.standard_normal(latents.shape, np.float32))
            amount = torch.from_numpy(rng.uniform(0, 0.25, (len(latents), 1, 1, 1)).astype(np.float32))
            picture[part] = (
                vae.decode(latents + amount * noise / vae.config.scaling_factor).sample.float().clamp(-1, 1)
            )
    out = []
    for one in picture:
        if rng.random() < 0.5:
            scale = float(rng.uniform(0.2, 0.7))  # down and up again, as a soft decoder does
            small = F.interpolate(one[None], scale_factor=scale, mode="area")
            one = F.interpolate(small, size=world.SIZE, mode="bilinear")[0]
        gain = torch.from_numpy(rng.uniform(0.92, 1.08, (3, 1, 1)).astype(np.float32))
        out.append((one * gain + float(rng.uniform(-0.08, 0.08))).clamp(-1, 1))
    return torch.stack(out).to(memory_format=torch.channels_last)


def train_judge(work: Path, out: Path) -> None:
    """Train, then set the threshold where precision and recall over new degraded scenes are most equal."""
    torch.manual_seed(SEED)
    vae, _ = base.load_codec(out)
    network = new_network(len(LABELS))

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng([SEED, step])
        scenes = [random_scene(rng) for _ in range(BATCH)]
        picture = degrade(np.stack([s.pixels for s in scenes]), rng, vae if step % 2 == 0 else None)
        target = torch.stack([cells_of(s) for s in scenes])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = network.train()(picture).float()
        return F.cross_entropy(logits, target, ignore_index=-1)

    loop.train("judge", work, network, loss_of, steps=STEPS, rate=RATE, decay=0.05)
    network.eval()
    rng = np.random.default_rng([SEED, 10**7])
    scenes = [random_scene(rng) for _ in range(600)]
    with torch.no_grad():
        pictures = degrade(np.stack([s.pixels for s in scenes]), rng, vae)
        scores = torch.cat([presence(network(part), LABELS) for part in torch.split(pictures, 64)])
    target = torch.stack([target_of(s) for s in scenes]).bool()
    thresholds = torch.linspace(0.2, 0.98, 40)
    gaps = []
    for threshold in thresholds:
        found = scores > threshold
        hits = (found & target).sum()
        gaps.append(abs(float(hits / found.sum().clamp(min=1) - hits / target.sum())))
    folder = out / "judge"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.half().contiguous() if v.is_floating_point() else v for k, v in network.state_dict().items()},
        folder / "model.safetensors",
    )
    settings = {
        "architecture": ARCHITECTURE,
        "labels": LABELS,
        "threshold": round(float(thresholds[int(np.argmin(gaps))]), 3),
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
