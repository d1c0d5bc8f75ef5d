"""Axes for the X/Y/Z plot: active experts, gates file, strength."""

from __future__ import annotations

from typing import Any

from .session import Session, add_change
from .settings import Settings, as_number

ACTIVE, GATES, STRENGTH = "[MoLE] Active experts", "[MoLE] Gates file", "[MoLE] Strength"


def add_axes(scripts_data: list[Any], session: Session) -> None:
    """Add the axes to the host's plot; a second call adds none.

    Args:
        scripts_data: the host's list of loaded scripts; their modules are named after their files.
    """
    for data in scripts_data:
        if data.script_class.__module__ not in ("xyz_grid.py", "scripts.xyz_grid", "xyz_grid"):
            continue
        plot = data.module
        known = {option.label for option in plot.axis_options}
        plot.axis_options.extend(axis for axis in _axes(plot.AxisOption, session) if axis.label not in known)


def _axes(option: Any, session: Session) -> list[Any]:
    return [
        option(ACTIVE, str, _apply_active),
        option(GATES, str, _apply_gates, choices=session.library.gates),
        option(STRENGTH, str, _apply_scale),
    ]


def _apply_active(p: Any, value: str, values: list[str]) -> None:
    """`dog+cat`; `all` for all that the panel has."""
    names = [] if value.strip().lower() == "all" else [name.strip() for name in value.split("+")]
    add_change(p, lambda settings: _if_on(settings, lambda s: s.with_active(names)))


def _apply_gates(p: Any, value: str, values: list[str]) -> None:
    add_change(p, lambda settings: _if_on(settings, lambda s: s.with_gates(value.strip())))


def _apply_scale(p: Any, value: str, values: list[str]) -> None:
    """`0.8` for all experts, `dog=0.8` for one."""
    name, found, number = value.rpartition("=")

    def change(settings: Settings) -> Settings:
        return settings.with_scale(as_number(number, "scale"), name.strip() if found else None)

    add_change(p, lambda settings: _if_on(settings, change))


def _if_on(settings: Settings, change: Any) -> Settings:
    """Axes do nothing to a picture without experts."""
    changed: Settings = change(settings) if settings.enabled else settings
    return changed
