"""The judge: a convolutional network (timm RegNet) that says which classes and subjects a picture shows.

It classifies every cell of an 8 x 8 grid (nothing, a class in a flat drawing, an expert's own subject); a
picture shows what its surest cell shows. `tools/starter/judge.py` trains it; it guides no training of gates.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

ARCHITECTURE = "regnetx_002"
STRIDE = 16
#: Height and width in pixels of the pictures it sees.
SIZE = 128
#: Begins the labels of experts' own subjects; the others are classes.
SUBJECT = "subject:"
#: Begins the names of the styles that a whole picture is drawn in.
STYLE = "style:"


def to_tensor(pixels: np.ndarray) -> Tensor:
    """(N, H, W, 3) bytes -> (N, 3, H, W) in -1..1, channels last."""
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1).to(
        memory_format=torch.channels_last
    )


def presence(cells: Tensor, labels: Sequence[str]) -> Tensor:
    """Probability that each label is in a picture, (N, labels), from logits (N, 1 + labels or more, 8, 8).

    A class counts in any drawing: its flat drawing and its subject together.

    Args:
        labels: classes, then the subjects of some of them.
    """
    likely = cells[:, : 1 + len(labels)].float().softmax(1)[:, 1:]
    count = sum(not label.startswith(SUBJECT) for label in labels)
    classes = likely[:, :count].clone()
    for index, label in enumerate(labels[count:], start=count):
        classes[:, labels.index(label.removeprefix(SUBJECT))] += likely[:, index]
    return torch.cat([classes, likely[:, count:]], 1).amax((2, 3))


class Judge:
    """The trained judge; `threshold` is on the probability of the surest cell."""

    def __init__(self, folder: Path) -> None:
        settings = json.loads((folder / "config.json").read_text())
        self.labels: list[str] = settings["labels"]
        self.threshold: float = settings["threshold"]
        self.styles: list[str] = settings["styles"]
        self.network = new_network(len(self.labels), len(self.styles))
        self.network.load_state_dict(
            {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
        )
        self.network.eval()

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> list[set[str]]:
        """What each picture shows: class names, `subject:NAME` of experts' own subjects, `style:NAME`."""
        stacked = np.stack([np.asarray(p.convert("RGB").resize((SIZE, SIZE))) for p in pictures])
        logits = torch.cat([self.network(part) for part in torch.split(to_tensor(stacked), 64)])
        scores = presence(logits, self.labels)
        styles = logits[:, 1 + len(self.labels) :].mean((2, 3)).argmax(1).tolist()
        found = []
        for row, style in zip(scores, styles, strict=True):
            shown = {label for label, s in zip(self.labels, row, strict=True) if s > self.threshold}
            found.append(shown | ({f"{STYLE}{self.styles[style - 1]}"} if style else set()))
        return found


def new_network(labels: int, styles: int) -> nn.Module:
    """Logits (N, 1 + labels + 1 + styles, 8, 8) from pictures (N, 3, 128, 128).

    The first tell what each cell shows (nothing first); the mean of the last, how the picture is drawn (plain
    first).
    """
    features: Any = timm.create_model(
        ARCHITECTURE, pretrained=False, num_classes=0, global_pool="", output_stride=STRIDE
    )
    network = nn.Sequential(features, nn.Conv2d(features.num_features, 2 + labels + styles, 1))
    return network.to(memory_format=torch.channels_last)
