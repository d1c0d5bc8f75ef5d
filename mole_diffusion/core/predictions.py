"""What denoisers of several hosts return."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def prediction_of(output: Any) -> Tensor:
    """The prediction in what a denoiser returns: itself, the first of a tuple, or an output of diffusers."""
    if isinstance(output, Tensor):
        return output
    found: Tensor = output[0] if isinstance(output, tuple) else output.sample
    return found


def with_prediction(output: Any, prediction: Tensor) -> Any:
    """The same with another prediction."""
    if isinstance(output, Tensor):
        return prediction
    if isinstance(output, tuple):
        return (prediction, *output[1:])
    return type(output)(sample=prediction)
