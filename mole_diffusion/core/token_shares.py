"""What makes and looks after the weights of tokens in a network, by what it is."""

from __future__ import annotations

from torch import nn

from .attention import AttentionMaps
from .auto import Auto
from .auto_shares import TextShares
from .balancing import Balance
from .errors import ConfigError
from .networks.base import DENOISER, NetworkMap
from .picture_shares import PictureShares
from .regions import RegionMasks
from .seen_attention import SeenAttention


def shares_of(
    auto: Auto,
    network: nn.Module,
    layout: NetworkMap,
    names: tuple[str, ...],
    active: tuple[int, ...],
    regions: RegionMasks | None,
) -> TextShares | PictureShares:
    """Weights of a network's tokens by the prompt.

    Args:
        auto: what the host knows.
        network: a denoiser or a text encoder.
        layout: what it is.
        names: of the experts, in the order of the rows.
        active: indices of those that count.
        regions: where experts count; None for everywhere.

    Raises:
        ConfigError: it is a denoiser whose attention to its texts nobody knows.
    """
    if layout.architecture.role != DENOISER:
        return TextShares(auto, layout.part, names, active)
    balance = Balance(layout.architecture, rows_apart=auto.rows_apart)
    layers = layout.architecture.text_readers(layout.sites)
    if layers:
        return PictureShares(auto, AttentionMaps(network, layers), balance, names, active, regions)
    looking = layout.architecture.looking(layout.sites)
    if looking is None:
        raise ConfigError(
            f"Attention to words tells which place is whose, and where {layout.architecture.name} networks "
            "have it is not known: train gates, or use mixture='nla'."
        )
    seen = SeenAttention(network, looking)
    return PictureShares(auto, seen, balance, names, active, regions, rewrites=looking.rewrites)
