"""Drawings of the panel as SVG: cells of the heat map tell their gate and weight under the pointer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mole_diffusion.core.heat_map import HeatMap, Panel

CELL, HEIGHT, LEFT = 14, 22, 130
_TITLES = {"unet": "UNet", "text_encoder_2": "second text encoder"}


def gate_map(weights: Mapping[str, Mapping[str, Sequence[float]]], experts: Sequence[str]) -> str:
    """One panel per network: experts as rows, gates in the order in which they run as columns.

    Args:
        weights: part -> gate -> mean weight per expert.
        experts: names in the order of the weights.
    Returns:
        HTML; a sentence if there is nothing to draw.
    """
    if not any(weights.values()):
        return "<p class='mole-note'>No gate weights yet: draw a picture with MoLE on.</p>"
    # Here, not above: panels are built before the host has loaded torch, which comes with the package.
    from mole_diffusion.core.heat_map import heat_map

    shown = heat_map(weights, experts, _TITLES)
    return f"<div class='mole-heatmap'>{''.join(_panel(shown, panel) for panel in shown.panels)}</div>"


def _panel(shown: HeatMap, panel: Panel) -> str:
    # Wide enough for the title.
    right = LEFT + CELL * len(panel.gates)
    width, height = max(right + 70, LEFT + 380), HEIGHT * (len(shown.experts) + 1)
    cells = []
    for number, (name, row) in enumerate(zip(shown.experts, panel.rows, strict=True), 1):
        y = HEIGHT * number
        cells.append(_text(LEFT - 6, y + 15, _shortened(name), "end"))
        cells.append(_text(right + 6, y + 15, f"{sum(row) / len(row):.2f}", "start"))
        for column, (gate, value) in enumerate(zip(panel.gates, row, strict=True)):
            title = escape(f"{name} in {gate}: {value:.3f}")
            colour = "".join(f"{part:02x}" for part in shown.colour(value))
            cells.append(
                f"<rect x='{LEFT + CELL * column}' y='{y + 1}' width='{CELL - 1}' height='{HEIGHT - 2}' "
                f"fill='#{colour}'><title>{title}</title></rect>"
            )
    title = f"{panel.title}; brightest = {shown.top:.2f}"
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
