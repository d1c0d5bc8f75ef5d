"""Cut and mix: several single-object pictures as one picture. Pure functions on tensors in 0..1.

The idea is SVDiff's (Han et al., 2023): cut the pictures of the concepts, put them side by side, and train
on the result with the joint prompt. "strips" is that to the letter; "scene" cuts the objects out and pastes
them into boxes on a common background, which is nearer to what the base draws of such a prompt.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Box = tuple[float, float, float, float]

#: Where objects stand in a scene of one, two, three objects, in the order of the prompt: left, top, right,
#: bottom as shares of the picture. Two stand side by side, three in a triangle. More take equal columns
#: (`scene_boxes`).
SCENE_BOXES: dict[int, tuple[Box, ...]] = {
    1: ((0.17, 0.20, 0.83, 0.86),),
    2: ((0.03, 0.33, 0.50, 0.80), (0.50, 0.33, 0.97, 0.80)),
    3: ((0.03, 0.47, 0.46, 0.90), (0.285, 0.05, 0.715, 0.48), (0.54, 0.47, 0.97, 0.90)),
}

#: Difference of colour (0..1) from which a pixel belongs to the object and no longer to the background.
_OBJECT_DIFFERENCE = 0.10
#: An object covers at least and at most this share of its picture; otherwise the cut is not trusted.
_OBJECT_SHARE = (0.02, 0.85)
#: Parts smaller than this share of the largest part are specks of the background.
_SPECK = 0.05
#: Share of the width at either side from which the background is read.
_EDGE = 0.05
#: Pictures are cut at this many pixels: finer masks cost time and change nothing at the size of latents.
_CUT_SIZE = 128


@dataclass(frozen=True)
class Cutout:
    """An object cut out of its picture: `pixels` (3, h, w) and `alpha` (1, h, w), both in 0..1.

    Where nothing plausible was found, it is not `trusted`: the middle of the picture as it is.
    """

    pixels: Tensor
    alpha: Tensor
    trusted: bool = True


@dataclass(frozen=True)
class Collage:
    """A mixed picture: `pixels` (3, H, W) in 0..1, and `covers` (objects, H, W), the share of each pixel
    that comes from each object; the rest is background."""

    pixels: Tensor
    covers: Tensor

    @property
    def inside(self) -> Tensor:
        """(1, H, W), the share of each pixel that comes from any object."""
        return self.covers.sum(dim=0, keepdim=True)


def scene_boxes(count: int) -> tuple[Box, ...]:
    """Boxes for `count` objects, from `SCENE_BOXES` or as equal columns."""
    if count in SCENE_BOXES:
        return SCENE_BOXES[count]
    height = min(0.8, 1.6 / count)
    return tuple((i / count, 0.5 - height / 2, (i + 1) / count, 0.5 + height / 2) for i in range(count))


def edge_background(picture: Tensor) -> Tensor:
    """The picture without its object: its left and right edges, blended across.

    Args:
        picture: (3, H, W) in 0..1, with the object away from one side at least.

    Returns:
        (3, H, W) in 0..1.
    """
    width = picture.shape[-1]
    columns = max(1, round(width * _EDGE))
    left = picture[..., :columns].median(dim=-1, keepdim=True).values
    right = picture[..., -columns:].median(dim=-1, keepdim=True).values
    across = torch.linspace(0, 1, width, dtype=picture.dtype, device=picture.device)
    return left * (1 - across) + right * across


def cut_out(picture: Tensor) -> Cutout:
    """Cut the one object out of a picture, by its difference from the background at the edges.

    Where that finds nothing plausible, the middle of the picture (its centre four fifths) is taken as it is.

    Args:
        picture: (3, H, W) in 0..1.
    """
    mask = object_mask(picture)
    share = float(mask.mean())
    height, width = picture.shape[-2:]
    trusted = _OBJECT_SHARE[0] <= share <= _OBJECT_SHARE[1]
    if trusted:
        rows = torch.nonzero(mask[0].amax(dim=1) > 0.5)[:, 0]
        columns = torch.nonzero(mask[0].amax(dim=0) > 0.5)[:, 0]
        top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    else:
        mask = torch.ones_like(mask)
        top, bottom, left, right = height // 10, height - height // 10, width // 10, width - width // 10
    return Cutout(picture[:, top:bottom, left:right], mask[:, top:bottom, left:right], trusted)


def object_mask(picture: Tensor) -> Tensor:
    """1 on the object of a picture, 0 on its background; holes inside the object count as object.

    Args:
        picture: (3, H, W) in 0..1.

    Returns:
        (1, H, W), 0 or 1.
    """
    height, width = picture.shape[-2:]
    scale = min(1.0, _CUT_SIZE / max(height, width))
    small = F.interpolate(picture[None], size=(round(height * scale), round(width * scale)), mode="area")[0]
    difference = (small - edge_background(small)).abs().amax(dim=0)[None, None]
    free = F.avg_pool2d(difference, 3, stride=1, padding=1, count_include_pad=False) < _OBJECT_DIFFERENCE
    # What cannot be reached from the top and the sides over background is the object with its holes.
    border = torch.zeros_like(difference)
    border[..., :1, :] = border[..., :, :1] = border[..., :, -1:] = 1
    outside = _spread(border * free, free) > 0
    return F.interpolate(_large_parts(~outside).float(), size=(height, width), mode="nearest")[0]


def _spread(values: Tensor, allowed: Tensor) -> Tensor:
    """Let the largest value (1, 1, H, W) of each connected part of `allowed` fill that part."""
    for _ in range(values.shape[-1] * values.shape[-2]):
        grown = F.max_pool2d(values, 3, stride=1, padding=1) * allowed
        if torch.equal(grown, values):
            break
        values = grown
    return values


def _large_parts(mask: Tensor) -> Tensor:
    """The connected parts of `mask` (1, 1, H, W) that are not specks such as stars and snow."""
    numbers = torch.arange(1, mask.numel() + 1, dtype=torch.float32, device=mask.device).view_as(mask)
    parts = _spread(numbers * mask, mask)
    sizes = torch.bincount(parts.flatten().long(), minlength=2)
    sizes[0] = 0
    large = sizes >= sizes.max() * _SPECK
    large[0] = False
    return large[parts.long()]


def paste(canvas: Tensor, cutout: Cutout, box: Box, seam: float) -> tuple[Tensor, Tensor]:
    """Put an object into a box, as large as fits, its own proportions kept, with a soft seam.

    Args:
        canvas: (3, H, W) in 0..1.
        cutout: The object.
        box: Left, top, right, bottom as shares of the canvas.
        seam: Width of the seam as a share of the canvas.

    Returns:
        The new picture (3, H, W) and how much of each pixel comes from the object (1, H, W).
    """
    height, width = canvas.shape[-2:]
    left, top, right, bottom = box
    scale = min(
        (right - left) * width / cutout.pixels.shape[-1], (bottom - top) * height / cutout.pixels.shape[-2]
    )
    h, w = (max(1, round(side * scale)) for side in cutout.pixels.shape[-2:])
    y = min(max(0, round((top + bottom) / 2 * height - h / 2)), max(0, height - h))
    x = min(max(0, round((left + right) / 2 * width - w / 2)), max(0, width - w))
    h, w = min(h, height), min(w, width)
    pixels = F.interpolate(cutout.pixels[None], size=(h, w), mode="bilinear", antialias=True)[0]
    alpha = F.interpolate(cutout.alpha[None], size=(h, w), mode="bilinear", antialias=True)[0]
    full = canvas.clone()
    full[:, y : y + h, x : x + w] = pixels
    cover = torch.zeros_like(canvas[:1])
    cover[:, y : y + h, x : x + w] = alpha
    # The seam lies inside the object, so that no rim of the old background shows.
    cover = _soften(cover, round(seam * width))
    return full * cover + canvas * (1 - cover), cover


def _soften(mask: Tensor, width: int) -> Tensor:
    """Let a mask (1, H, W) fall to 0 over `width` pixels inside its border."""
    if width < 1:
        return mask
    size = 2 * (width // 2) + 1
    eroded = -F.max_pool2d(-mask[None], size, stride=1, padding=size // 2)
    return F.avg_pool2d(eroded, size, stride=1, padding=size // 2, count_include_pad=False)[0]


def mix_scene(background: Tensor, cutouts: Sequence[Cutout], boxes: Sequence[Box], seam: float) -> Collage:
    """Objects in their boxes on a background, in order.

    Args:
        background: (3, H, W) in 0..1.
        cutouts: The objects.
        boxes: As many boxes.
        seam: Width of soft seams as a share of the picture.
    """
    if len(cutouts) != len(boxes):
        raise ValueError(f"{len(cutouts)} objects need as many boxes, got {len(boxes)}")
    pixels, covers = background, background[:0]
    for cutout, box in zip(cutouts, boxes, strict=True):
        pixels, cover = paste(pixels, cutout, box, seam)
        covers = torch.cat([covers * (1 - cover), cover])
    return Collage(pixels, covers)


def mix_strips(pictures: Sequence[Tensor], seam: float) -> Collage:
    """Centre strips of the pictures side by side, in full height, from left to right.

    Args:
        pictures: Each (3, H, W) in 0..1.
        seam: Width of the blend between neighbours as a share of the picture.
    """
    width, count = pictures[0].shape[-1], len(pictures)
    position = (torch.arange(width, dtype=torch.float32) + 0.5) / width
    mixed, weights = torch.zeros_like(pictures[0]), []
    for i, picture in enumerate(pictures):
        # The middle of the strip shows the middle of the picture.
        moved = torch.roll(picture, round((i + 0.5) / count * width - width / 2), dims=-1)
        distance = torch.minimum(position - i / count, (i + 1) / count - position)
        weights.append((distance / max(seam, 1e-6) + 0.5).clamp(0, 1))
        mixed = mixed + moved * weights[-1]
    shares = torch.stack(weights) / torch.stack(weights).sum(dim=0)
    return Collage(mixed / torch.stack(weights).sum(dim=0), shares[:, None].expand(-1, *mixed.shape[1:]))


def jitter_boxes(boxes: Sequence[Box], amount: float, rng: random.Random) -> tuple[Box, ...]:
    """Boxes moved and scaled at random by at most `amount` of the picture, kept inside it."""
    moved = []
    for left, top, right, bottom in boxes:
        grow = rng.uniform(-amount, amount) / 2
        dx, dy = rng.uniform(-amount, amount), rng.uniform(-amount, amount)
        width, height = max(0.05, right - left + grow), max(0.05, bottom - top + grow)
        x = min(max(0.0, (left + right - width) / 2 + dx), max(0.0, 1 - width))
        y = min(max(0.0, (top + bottom - height) / 2 + dy), max(0.0, 1 - height))
        moved.append((x, y, min(1.0, x + width), min(1.0, y + height)))
    return tuple(moved)
