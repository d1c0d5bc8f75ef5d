"""What denoisers of several hosts return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def prediction_of(output: Any) -> Tensor:
    """The prediction in what a denoiser returns: itself, the first of a tuple, or an output of diffusers.

    Pictures that are returned one by one are a batch.
    """
    found = output if isinstance(output, Tensor) else output[0]
    return torch.stack(found) if isinstance(found, list) else found


def with_prediction(output: Any, prediction: Tensor) -> Any:
    """The same with another prediction."""
    if isinstance(output, Tensor):
        return prediction
    found = list(prediction) if isinstance(output[0], list) else prediction
    return (found, *output[1:]) if isinstance(output, tuple) else type(output)(sample=found)


def by_place(prediction: Tensor) -> Tensor:
    """(R, T, C) of a prediction (R, T, C), (R, C, H, W) or, of frames, (R, C, 1, H, W)."""
    return prediction if prediction.dim() == 3 else prediction.flatten(2).transpose(1, 2)


def like_prediction(places: Tensor, prediction: Tensor) -> Tensor:
    """(R, T, C) in the shape of a prediction; the inverse of `by_place`."""
    return places if prediction.dim() == 3 else places.transpose(1, 2).reshape(prediction.shape)
