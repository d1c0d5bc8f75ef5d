"""Heat map of gate weights as SVG: hosts have no plotting library in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

CELL, HEIGHT, LEFT = 14, 22, 130
_TITLES = {"unet": "UNet", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}
# Colour stops from 0 to the largest weight (red, green, blue); readable on dark and light pages.
_STOPS = ((34, 38, 70), (45, 105, 140), (60, 160, 130), (160, 205, 80), (250, 230, 60))


def gate_map(weights: Mapping[str, Mapping[str, Sequence[float]]], experts: Sequence[str]) -> str:
    """One panel per network: experts as rows, gates in the order in which they run as columns.

    Args:
        weights: part -> gate -> mean weight per expert.
        experts: names in the order of the weights.
    Returns:
        HTML; a sentence if there is nothing to draw.
    """
    panels = [_panel(part, gates, experts) for part, gates in weights.items() if gates]
    if not panels:
        return "<p class='mole-note'>No gate weights yet: draw a picture with MoLE on.</p>"
    return f"<div class='mole-heatmap'>{''.join(panels)}</div>"


def _panel(part: str, gates: Mapping[str, Sequence[float]], experts: Sequence[str]) -> str:
    top = max(max(row) for row in gates.values()) or 1.0
    # Wide enough for the title.
    width, height = max(LEFT + CELL * len(gates) + 70, LEFT + 380), HEIGHT * (len(experts) + 1)
    cells = []
    for row, name in enumerate(experts):
        y = HEIGHT * (row + 1)
        mean = sum(values[row] for values in gates.values()) / len(gates)
        cells.append(_text(LEFT - 6, y + 15, _shortened(name), "end"))
        cells.append(_text(LEFT + CELL * len(gates) + 6, y + 15, f"{mean:.2f}", "start"))
        for column, (gate, values) in enumerate(gates.items()):
            title = escape(f"{name} in {gate}: {values[row]:.3f}")
            cells.append(
                f"<rect x='{LEFT + CELL * column}' y='{y + 1}' width='{CELL - 1}' height='{HEIGHT - 2}' "
                f"fill='{_colour(values[row] / top)}'><title>{title}</title></rect>"
            )
    title = f"{_TITLES.get(part, part)}: {len(gates)} gates in running order, brightest = {top:.2f}"
    cells.append(_text(LEFT, 15, title, "start"))
    return (
        f"<svg viewBox='0 0 {width} {height}' width='{width}' height='{height}' role='img' "
        f"aria-label='{escape(title)}'>{''.join(cells)}</svg>"
    )


def region_map(regions: Mapping[str, tuple[float, float, float, float] | None]) -> str:
    """A sketch of where experts act: name -> rectangle in shares of the picture, None for everywhere."""
    placed = {name: region for name, region in regions.items() if region is not None}
    if not placed:
        return ""
    side, parts = 150, []
    for index, (name, (left, top, width, height)) in enumerate(placed.items()):
        hue = (index * 137) % 360
        parts.append(
            f"<rect x='{left * side:.1f}' y='{top * side:.1f}' width='{width * side:.1f}' "
            f"height='{height * side:.1f}' fill='hsl({hue} 65% 55% / 45%)' stroke='hsl({hue} 65% 45%)'/>"
        )
        parts.append(_text(left * side + 5, top * side + 16, _shortened(name), "start"))
    return (
        f"<svg class='mole-regions' viewBox='0 0 {side} {side}' width='{side}' height='{side}' role='img' "
        f"aria-label='regions of the experts'><rect width='{side}' height='{side}' fill='none' "
        f"stroke='currentColor'/>{''.join(parts)}</svg>"
    )


def loss_curve(losses: Sequence[float]) -> str:
    """A line of losses over iterations."""
    if len(losses) < 2:
        return ""
    width, height = 460, 120
    low, high = min(losses), max(losses)
    span = (high - low) or 1.0
    across, down = (width - 10) / (len(losses) - 1), (height - 16) / span
    places = ((5 + across * i, height - 8 - down * (loss - low)) for i, loss in enumerate(losses))
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return (
        f"<svg class='mole-loss' viewBox='0 0 {width} {height}' width='{width}' height='{height}' "
        f"role='img' aria-label='loss'>"
        f"<polyline points='{points}' fill='none' stroke='currentColor' stroke-width='1.5'/>"
        f"{_text(8, 14, f'loss, {low:.3f} to {high:.3f}', 'start')}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}'>{escape(text)}</text>"


def _shortened(name: str) -> str:
    return name if len(name) <= 17 else f"{name[:15]}…"


def _colour(share: float) -> str:
    position = min(max(share, 0.0), 1.0) * (len(_STOPS) - 1)
    index = min(int(position), len(_STOPS) - 2)
    rest = position - index
    mixed = (round(a + (b - a) * rest) for a, b in zip(_STOPS[index], _STOPS[index + 1], strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)
