"""Where in the picture each expert acts: what the gates of image tokens said, laid over the picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import functional
from .context import ForwardContext
from .groups import Group
from .networks.base import JOINT, TOKENS
from .values import GateValue


@torch.no_grad()
def mean_map(context: ForwardContext, groups: Sequence[Group]) -> Tensor | None:
    """Gate weights of the last forward, region masks applied, as the mean of all gates of image tokens.

    Gates that say the same for the whole picture count evenly everywhere. Strength and the experts' scales
    are left out: it is a share, of how much an expert counts beside the others.

    Args:
        context: of the mixture.
        groups: of the mixture.
    Returns:
        (B, N, height, width) of the latent's size, float32, shares from 0 to 1; None where no gate of image
        tokens ran or where the forward knows no size.
    """
    size = context.forward.size
    if size is None:
        return None
    total, count = None, 0
    for group in groups:
        value = context.live.get(group.label(TOKENS))
        if value is None or group.first(TOKENS).stream not in (TOKENS, JOINT):
            continue
        laid = _laid(value, context, size)
        if laid is not None:
            total, count = laid if total is None else total + laid, count + 1
    return None if total is None else total / count


def _laid(value: GateValue, context: ForwardContext, size: tuple[int, int]) -> Tensor | None:
    """(B, N, height, width) of one gate; None where its tokens are not those of the picture."""
    weights, regions, grid = value.weights.float(), context.activation.regions, size
    if value.tokens > 1:
        drawn = value.tokens - context.forward.references
        found = None if context.forward.grid is None else context.forward.grid(drawn)
        if found is None:
            return None
        weights, grid = weights[:, :drawn], found
    if regions is not None:
        weights = functional.region_weights(weights, regions.on_grid(*grid, weights.device))
    laid = weights.transpose(1, 2)
    if laid.shape[-1] == 1:
        return laid[..., None].expand(-1, -1, *size)
    laid = laid.reshape(*laid.shape[:2], *grid)
    return torch.nn.functional.interpolate(laid, size, mode="bilinear", align_corners=False)
