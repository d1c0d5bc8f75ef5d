"""Curves as SVG: sharp at any size, in the page's own colours, cheap enough to draw anew every second."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

_WIDTH, _HEIGHT = 420, 170
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 12, 24
# More points than this cannot be told apart.
_POINTS = 280


def curves(
    title: str,
    series: Mapping[str, tuple[str, Sequence[float]]],
    total: int,
    *,
    level: tuple[str, float] | None = None,
    bottom: float | None = None,
) -> str:
    """One chart as HTML.

    Args:
        title: heading.
        series: name -> (colour, one value per iteration from 1 on).
        total: iterations on the whole axis.
        level: a dashed line with its name.
        bottom: lower end of the axis; None follows the values.
    """
    values = [v for _, ys in series.values() for v in ys if math.isfinite(v)]
    if not values:
        return ""
    edges = [*values, *([level[1]] if level else [])]
    low = min(edges) if bottom is None else bottom
    high = max(edges)
    if high - low < 1e-9:
        high = low + 1e-3
    high += 0.06 * (high - low)
    parts = [_axis(low, high, total)]
    if level is not None:
        y = _y(level[1], low, high)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}" class="chart-level"/>')
        parts.append(
            f'<text x="{_WIDTH - _RIGHT}" y="{y - 4:.1f}" text-anchor="end">{html.escape(level[0])}</text>'
        )
    for colour, ys in series.values():
        parts.append(_line(colour, ys, low, high, total))
    names = "".join(
        f'<span class="dot" style="--dot: {colour}">{html.escape(name)} <b>{ys[-1]:.3f}</b></span>'
        for name, (colour, ys) in series.items()
        if ys
    )
    label = html.escape(f"{title}: " + ", ".join(f"{n} {ys[-1]:.3f}" for n, (_, ys) in series.items() if ys))
    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    return (
        f'<figure class="chart"><figcaption><span>{html.escape(title)}</span>{names}</figcaption>'
        f'<svg {size} role="img" aria-label="{label}">{"".join(parts)}</svg></figure>'
    )


def smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """A running mean that starts with the first value."""
    out: list[float] = []
    for value in values:
        out.append(value if not out else weight * out[-1] + (1 - weight) * value)
    return out


def _axis(low: float, high: float, total: int) -> str:
    parts = []
    for share in (0.0, 0.5, 1.0):
        value = low + share * (high - low)
        y = _y(value, low, high)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}" class="chart-grid"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.2f}</text>')
    for share in (0.0, 0.5, 1.0):
        x = _LEFT + share * (_WIDTH - _LEFT - _RIGHT)
        anchor = {0.0: "start", 1.0: "end"}.get(share, "middle")
        parts.append(
            f'<text x="{x:.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{round(total * share)}</text>'
        )
    return "".join(parts)


def _line(colour: str, ys: Sequence[float], low: float, high: float, total: int) -> str:
    step = max(1, math.ceil(len(ys) / _POINTS))
    width = _WIDTH - _LEFT - _RIGHT
    kept = [(i, ys[i]) for i in range(0, len(ys), step)]
    if ys:
        kept.append((len(ys) - 1, ys[-1]))
    points = " ".join(f"{_LEFT + (i + 1) / max(total, 1) * width:.1f},{_y(v, low, high)}" for i, v in kept)
    return f'<polyline points="{points}" style="stroke: {colour}" class="chart-line"/>'


def _y(value: float, low: float, high: float) -> float:
    share = (value - low) / (high - low)
    return round(_TOP + (1 - share) * (_HEIGHT - _TOP - _BOTTOM), 1)
