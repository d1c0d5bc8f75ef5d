"""Metrics as pure functions: features or labels in, one number per picture out."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import functional as F

#: Windows for the best crop: side as a share of the picture, and places along each axis.
CROPS = ((0.45, 3), (0.6, 2))

PRESENT, CONFUSED, OMITTED = "present", "confused", "omitted"
#: Whether a picture is drawn in a style.
STYLED = "styled"


def text_alignment(pictures: Tensor, texts: Tensor) -> Tensor:
    """Cosine of picture and text (CLIP score without its factor; Hessel et al. 2021).

    Args:
        pictures: features (B, d).
        texts: features (B, d), one text per picture.

    Returns:
        (B,), from -1 to 1.
    """
    return torch.cosine_similarity(pictures.float(), texts.float(), dim=-1)


def image_alignment(pictures: Tensor, references: Tensor) -> Tensor:
    """Mean cosine of a picture with the reference pictures of a concept (DreamBooth's CLIP-I and DINO).

    Args:
        pictures: features (B, d).
        references: features (R, d).

    Returns:
        (B,), from -1 to 1.
    """
    cosines = F.normalize(pictures.float(), dim=-1) @ F.normalize(references.float(), dim=-1).T
    return cosines.mean(dim=1)


def best_crop_alignment(windows: Tensor, references: Tensor) -> Tensor:
    """Image alignment of the window that shows the concept best.

    Args:
        windows: features (B, W, d) of W windows of each picture.
        references: features (R, d).

    Returns:
        (B,), from -1 to 1.
    """
    batch, count, width = windows.shape
    return image_alignment(windows.reshape(-1, width), references).view(batch, count).amax(dim=1)


def crop_boxes(width: int, height: int) -> list[tuple[int, int, int, int]]:
    """Boxes (left, top, right, bottom) in pixels of the windows that `best_crop_alignment` looks at."""
    boxes = []
    for share, places in CROPS:
        w, h = round(width * share), round(height * share)
        for row in range(places):
            for column in range(places):
                x = round((width - w) * column / (places - 1))
                y = round((height - h) * row / (places - 1))
                boxes.append((x, y, x + w, y + h))
    return boxes


def verdict(labels: Collection[str], class_label: str, subject_label: str) -> str:
    """What became of a concept in a picture.

    Args:
        labels: what a judge found.
        class_label: any such thing ("boot").
        subject_label: the expert's own ("subject:boot").

    Returns:
        "present" (the subject is there), "confused" (a thing of its class, but not the subject) or "omitted"
        (neither).
    """
    if subject_label in labels:
        return PRESENT
    return CONFUSED if class_label in labels else OMITTED
