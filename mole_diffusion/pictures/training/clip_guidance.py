"""CLIP as a guide: differentiable views and crops of pictures, and features of pictures and texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mole_diffusion.core.errors import TrainingError

#: Scales of the crops of the local term, as shares of the picture.
CROP_SCALES = (0.4, 0.6)
#: Scales of the augmented views of the global term.
VIEW_SCALES = (0.75, 1.0)


class ClipGuide:
    """An open_clip model with its tokenizer, frozen.

    Args:
        model: The model.
        tokenizer: Turns a list of texts into token ids.
        device: Where it runs.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, device: torch.device) -> None:
        self.model = model.eval().requires_grad_(False).to(device)
        self.tokenizer = tokenizer
        self.device = device
        visual: Any = model.visual
        size = visual.image_size
        self.size: tuple[int, int] = (size, size) if isinstance(size, int) else (size[0], size[1])
        mean = getattr(visual, "image_mean", None) or (0.48145466, 0.4578275, 0.40821073)
        std = getattr(visual, "image_std", None) or (0.26862954, 0.26130258, 0.27577711)
        self._mean = torch.tensor(mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(std, device=device).view(1, 3, 1, 1)
        self._texts: dict[str, Tensor] = {}

    @classmethod
    def load(cls, clip: str | tuple[str, str], device: torch.device) -> ClipGuide:
        """Load any model of open_clip.

        Args:
            clip: A name such as `"local-dir:/folder"` or `"hf-hub:org/name"`, or a pair (model,
                pretrained).
            device: Where it runs.

        Raises:
            TrainingError: if open_clip is not installed, or has no such model.
        """
        try:
            import open_clip
        except ImportError as error:
            raise TrainingError("CLIP guidance needs open_clip: pip install open_clip_torch") from error
        name, pretrained = (clip, None) if isinstance(clip, str) else clip
        try:
            model = open_clip.create_model(name, pretrained=pretrained, device=str(device))
            tokenizer = open_clip.get_tokenizer(name)
        except (RuntimeError, FileNotFoundError, ValueError) as error:
            raise TrainingError(f"clip is {clip!r}, which open_clip cannot load: {error}") from error
        return cls(model, tokenizer, device)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features (len(texts), d) of unit length, without gradient; each text is encoded once."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if new:
            with torch.no_grad():
                features = self.model.encode_text(self.tokenizer(new).to(self.device))  # type: ignore[operator]
            self._texts.update(zip(new, F.normalize(features.float(), dim=-1), strict=True))
        return torch.stack([self._texts[text] for text in texts])

    def pictures(self, pictures: Tensor) -> Tensor:
        """Features (batch, d) of unit length, with gradient.

        Args:
            pictures: (batch, 3, H, W) in 0..1, any size.
        """
        if pictures.shape[-2:] != self.size:
            pictures = F.interpolate(
                pictures, size=self.size, mode="bicubic", antialias=True, align_corners=False
            )
        features = self.model.encode_image((pictures.float() - self._mean) / self._std)  # type: ignore[operator]
        return F.normalize(features.float(), dim=-1)

    def windows(self, pictures: Tensor, boxes: Tensor) -> Tensor:
        """Features (batch, windows, d) of parts of pictures.

        Args:
            pictures: (batch, 3, H, W) in 0..1.
            boxes: (batch, windows, 4) from `random_views` or `random_crops`.
        """
        batch, count = boxes.shape[:2]
        parts = cut_windows(pictures, boxes.to(pictures.device), self.size)
        return self.pictures(parts).view(batch, count, -1)


def cut_windows(pictures: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut and resize windows out of pictures, with gradient.

    Args:
        pictures: (batch, 3, H, W).
        boxes: (batch, windows, 4): centre x, centre y, width and height as shares of the picture; a negative
            width mirrors.
        size: Height and width of a window.

    Returns:
        (batch * windows, 3, *size).
    """
    batch, count = boxes.shape[:2]
    centre_x, centre_y, width, height = boxes.reshape(-1, 4).float().unbind(dim=1)
    zero = torch.zeros_like(width)
    rows = [torch.stack([width, zero, 2 * centre_x - 1], 1), torch.stack([zero, height, 2 * centre_y - 1], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), [batch * count, pictures.shape[1], *size], align_corners=False)
    # Sampling the pictures once per window copies only views.
    repeated = pictures.float()[:, None].expand(-1, count, -1, -1, -1).flatten(0, 1)
    return F.grid_sample(repeated, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def random_views(batch: int, count: int, draws: torch.Generator) -> Tensor:
    """Augmented views (batch, count, 4): 75-100 % of the picture, shifted, one in two mirrored."""
    low, high = VIEW_SCALES
    scale = low + (high - low) * torch.rand(batch, count, generator=draws)
    centres = scale[..., None] / 2 + (1 - scale[..., None]) * torch.rand(batch, count, 2, generator=draws)
    mirror = torch.where(torch.rand(batch, count, generator=draws) < 0.5, -1.0, 1.0)
    return torch.cat([centres, (scale * mirror)[..., None], scale[..., None]], dim=-1)


def random_crops(batch: int, count: int, draws: torch.Generator) -> Tensor:
    """Crops (batch, count, 4): 40-60 % of the picture on a jittered grid, so that they cover it."""
    low, high = CROP_SCALES
    columns = max(1, round(count**0.5))
    rows = -(-count // columns)
    cells = torch.stack([torch.arange(count) % columns, torch.arange(count) // columns], dim=-1)
    scale = low + (high - low) * torch.rand(batch, count, 1, generator=draws)
    places = (cells + torch.rand(batch, count, 2, generator=draws)) / torch.tensor([columns, rows])
    return torch.cat([scale / 2 + (1 - scale) * places, scale, scale], dim=-1)
