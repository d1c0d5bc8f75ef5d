"""Region masks as users have them (pictures, arrays, tensors) to what the core takes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from mole_diffusion.core.errors import RegionMaskError


def region_tensors(masks: Mapping[str, Any], height: int, width: int) -> dict[str, torch.Tensor]:
    """Region masks at picture size as float32 tensors (height, width) in 0..1.

    Args:
        masks: expert name -> PIL picture (read as grey), numpy array or tensor (H, W); bool, uint8 (0..255)
            or float (0..1).
        height, width: the picture's size in pixels.

    Raises:
        RegionMaskError: a mask of another size, shape, kind or range.
    """
    return {name: _region_tensor(name, mask, height, width) for name, mask in masks.items()}


def _region_tensor(name: str, mask: Any, height: int, width: int) -> torch.Tensor:
    tensor = _to_tensor(name, mask)
    if tensor.ndim != 2:
        raise RegionMaskError(
            f"region mask of {name!r} has shape {tuple(tensor.shape)}, expected (height, width)"
        )
    if tensor.shape != (height, width):
        raise RegionMaskError(
            f"region mask of {name!r} is {tensor.shape[1]} x {tensor.shape[0]} pixels (width x height),"
            f" the picture is {width} x {height}"
        )
    values = tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor.float()
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise RegionMaskError(
            f"region mask of {name!r} has values from {values.min():g} to {values.max():g},"
            " expected 0 to 1 (or 0 to 255 as uint8)"
        )
    return values


def _to_tensor(name: str, mask: Any) -> torch.Tensor:
    if isinstance(mask, Image.Image):
        return torch.from_numpy(np.array(mask.convert("L")))
    if isinstance(mask, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(mask))
    if isinstance(mask, torch.Tensor):
        return mask.detach().cpu()
    raise RegionMaskError(
        f"region mask of {name!r} is a {type(mask).__name__}, expected a PIL picture, numpy array or tensor"
    )
