"""Curves as SVG: sharp at any size, in the page's own colours, cheap enough to draw anew every second."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from mole_diffusion.app import markup

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
) -> Markup:
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
        return markup.NOTHING
    edges = [*values, *([level[1]] if level else [])]
    low = min(edges) if bottom is None else bottom
    high = max(edges)
    if high - low < 1e-9:
        high = low + 1e-3
    high += 0.06 * (high - low)
    parts = [_axis(low, high, total)]
    if level is not None:
        parts.append(_level(*level, low, high))
    parts += [_line(colour, ys, low, high, total) for colour, ys in series.values()]
    ends = [(name, colour, f"{ys[-1]:.3f}") for name, (colour, ys) in series.items() if ys]
    names = markup.join(
        markup.dot(markup.html("{} <b>{}</b>", name, value), colour) for name, colour, value in ends
    )
    label = f"{title}: " + ", ".join(f"{name} {value}" for name, _, value in ends)
    return markup.html(
        '<figure class="chart"><figcaption><span>{}</span>{}</figcaption>'
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg></figure>',
        title,
        names,
        _WIDTH,
        _HEIGHT,
        label,
        markup.join(parts),
    )


def smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """A running mean that starts with the first value."""
    out: list[float] = []
    for value in values:
        out.append(value if not out else weight * out[-1] + (1 - weight) * value)
    return out


def _level(name: str, value: float, low: float, high: float) -> Markup:
    y = _y(value, low, high)
    return markup.html(
        '<line x1="{0}" x2="{1}" y1="{2}" y2="{2}" class="chart-level"/>'
        '<text x="{1}" y="{3:.1f}" text-anchor="end">{4}</text>',
        _LEFT,
        _WIDTH - _RIGHT,
        y,
        y - 4,
        name,
    )


def _axis(low: float, high: float, total: int) -> Markup:
    parts = []
    for share in (0.0, 0.5, 1.0):
        value = low + share * (high - low)
        y = _y(value, low, high)
        parts.append(
            markup.html(
                '<line x1="{}" x2="{}" y1="{y}" y2="{y}" class="chart-grid"/>', _LEFT, _WIDTH - _RIGHT, y=y
            )
        )
        parts.append(
            markup.html('<text x="{}" y="{:.1f}" text-anchor="end">{:.2f}</text>', _LEFT - 6, y + 4, value)
        )
    for share in (0.0, 0.5, 1.0):
        x = _LEFT + share * (_WIDTH - _LEFT - _RIGHT)
        anchor = {0.0: "start", 1.0: "end"}.get(share, "middle")
        place, number = (x, _HEIGHT - 6, anchor), round(total * share)
        parts.append(markup.html('<text x="{:.1f}" y="{}" text-anchor="{}">{}</text>', *place, number))
    return markup.join(parts)


def _line(colour: str, ys: Sequence[float], low: float, high: float, total: int) -> Markup:
    step = max(1, math.ceil(len(ys) / _POINTS))
    width = _WIDTH - _LEFT - _RIGHT
    kept = [(i, ys[i]) for i in [*range(0, len(ys), step), len(ys) - 1] if math.isfinite(ys[i])]
    points = " ".join(f"{_LEFT + (i + 1) / max(total, 1) * width:.1f},{_y(v, low, high)}" for i, v in kept)
    return markup.html(
        '<polyline points="{}" style="stroke: {}" class="chart-line"/>', points, markup.colour(colour)
    )


def _y(value: float, low: float, high: float) -> float:
    share = (value - low) / (high - low)
    return round(_TOP + (1 - share) * (_HEIGHT - _TOP - _BOTTOM), 1)
