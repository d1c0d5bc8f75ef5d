"""What a heat map of gate weights shows (paper, Fig. 7), whatever draws it: pixels or a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .errors import ConfigError

# From no weight to the largest: viridis, which is read in grey and by the colour-blind too.
_STOPS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
# Cells of more than this share of the largest weight are light.
_LIGHT = 0.6


@dataclass(frozen=True)
class Panel:
    """The gates of one network.

    Attributes:
        title: the network and how many gates.
        gates: their names, in the order in which they run.
        rows: one per expert, a weight per gate.
    """

    title: str
    gates: tuple[str, ...]
    rows: tuple[tuple[float, ...], ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """Short names of the gates."""
        return tuple(map(short_group_name, self.gates))


@dataclass(frozen=True)
class HeatMap:
    """Panels with the same experts and one scale of colours.

    Attributes:
        experts: names, in the order of the rows.
        panels: one per network.
        top: the largest weight, above 0.
    """

    experts: tuple[str, ...]
    panels: tuple[Panel, ...]
    top: float

    def colour(self, weight: float) -> tuple[int, int, int]:
        """Red, green and blue (0 to 255) of a cell."""
        place = min(max(weight / self.top, 0.0), 1.0) * (len(_STOPS) - 1)
        index = min(int(place), len(_STOPS) - 2)
        red, green, blue = (
            round(low + (high - low) * (place - index))
            for low, high in zip(_STOPS[index], _STOPS[index + 1], strict=True)
        )
        return red, green, blue

    def is_light(self, weight: float) -> bool:
        """Whether a cell wants dark letters."""
        return weight > _LIGHT * self.top


def heat_map(
    weights: Mapping[str, Mapping[str, Sequence[float]]],
    experts: Sequence[str],
    names: Mapping[str, str] = {},
) -> HeatMap:
    """Lay gate weights out: a panel per network, experts as rows, gates as columns in execution order.

    Args:
        weights: network -> gate -> a weight per expert, as `core.records.in_order` returns them.
        experts: names, in the order of the weights.
        names: what a host's users call networks, where it is not what the code calls them.
    Raises:
        ConfigError: no weights at all, or a gate with another number of them.
    """
    panels = []
    for network, gates in weights.items():
        for gate, own in gates.items():
            if len(own) != len(experts):
                raise ConfigError(f"weights[{network!r}][{gate!r}]: {len(own)} for {len(experts)} experts")
        if gates:
            title = f"{names.get(network, network.replace('_', ' '))}: {len(gates)} gates, first to last"
            rows = zip(*(map(float, own) for own in gates.values()), strict=True)
            panels.append(Panel(title, tuple(gates), tuple(rows)))
    if not panels or not experts:
        raise ConfigError("weights: no gate weights to draw; record a generation first")
    top = max(max(row) for panel in panels for row in panel.rows)
    return HeatMap(tuple(experts), tuple(panels), max(top, 1e-6))


def short_group_name(name: str) -> str:
    """Abbreviate a module's name: `refiner_blocks.0.attn.1.to_q` -> `refiner 0.1 to_q`."""
    words = name.split(".")
    numbers = [word for word in words if word.isdigit()]
    head = words[0].removesuffix("_blocks").removesuffix("_block")
    tail = [] if words[-1].isdigit() or len(words) == 1 else [words[-1]]
    return " ".join([head, *([".".join(numbers)] if numbers else []), *tail])
