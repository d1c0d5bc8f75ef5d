"""The styles of the starter's style experts, as operations on a batch of pictures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)


def _colour(picture: Tensor, *rgb: float) -> Tensor:
    return picture.new_tensor(rgb).view(1, 3, 1, 1) / 255


def blurred(picture: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (N, C, H, W) with a deviation of `sigma` pixels; the rim is repeated."""
    radius = max(1, round(3 * sigma))
    offsets = torch.arange(-radius, radius + 1, device=picture.device, dtype=picture.dtype)
    kernel = torch.exp(-offsets.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(picture.shape[1], 1, -1)
    groups = picture.shape[1]
    padded = F.pad(picture, (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel[:, :, None], groups=groups), kernel[..., None], groups=groups)


def edges(picture: Tensor) -> Tensor:
    """Lines where brightness or colour changes, (N, 1, H, W) in 0..1."""
    soft = blurred(picture, 0.6)
    across = F.pad(soft[..., 2:] - soft[..., :-2], (1, 1, 0, 0))
    down = F.pad(soft[..., 2:, :] - soft[..., :-2, :], (0, 0, 1, 1))
    size = (across.square() + down.square()).sum(1, keepdim=True).sqrt()
    return (size * 2.6 - 0.12).clamp(0, 1)


def redraw(picture: Tensor, style: str) -> Tensor:
    """Pictures (N, 3, H, W) in 0..1 drawn anew in one style.

    `sketch`: pencil on paper; `blueprint`: white lines on blue; `print`: coral and indigo ink
    on cream paper; `neon`: glowing lines in the colours of the picture, in the dark.

    Raises:
        ValueError: there is no such style.
    """
    tone = (picture * picture.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    if style == "sketch":
        paper = _colour(picture, 246, 240, 226) * (0.66 + 0.34 * tone)
        line = edges(picture)
        return paper * (1 - line) + _colour(picture, 52, 48, 48) * line
    if style == "blueprint":
        paper = _colour(picture, 22, 62, 150) * (0.85 + 0.3 * tone)
        line = edges(picture)
        return paper * (1 - line) + _colour(picture, 236, 244, 255) * line
    if style == "print":
        # Two inks on paper, one over the other where it is darkest, and a line around everything.
        light, dark = (torch.sigmoid((limit - tone) * 30) for limit in (0.72, 0.42))
        inked = _colour(picture, 252, 243, 224) * (1 - light) + _colour(picture, 244, 96, 84) * light
        line = torch.maximum(dark, edges(picture))
        return inked * (1 - line) + _colour(picture, 44, 38, 104) * line
    if style == "neon":
        low, high = picture.amin(1, keepdim=True), picture.amax(1, keepdim=True)
        vivid = ((picture - low) / (high - low + 0.08)).clamp(0, 1) * 0.85 + 0.15
        light = edges(picture) * vivid
        glow = blurred(light, 2.5) * 0.9
        return (_colour(picture, 18, 8, 34) * (0.7 + 0.5 * tone) + light + glow).clamp(0, 1)
    raise ValueError(f"unknown style {style!r}; known: sketch, blueprint, print, neon")
