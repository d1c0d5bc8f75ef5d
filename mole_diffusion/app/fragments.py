"""Pieces of the Compose tab as HTML."""

from __future__ import annotations

import html

from mole_diffusion.app.metadata import PictureSettings
from mole_diffusion.app.session import Session
from mole_diffusion.pictures.opening import STARTER

#: Pictures that the gallery shows at once.
SHOWN = 64


def gallery(session: Session) -> list[tuple[str, str]]:
    """The newest pictures with their captions."""
    return [
        (str(picture.path), f"{picture.settings.mixture} · seed {picture.settings.seed}")
        for picture in session.pictures[:SHOWN]
    ]


def notice(session: Session) -> str:
    """What somebody should know before drawing; empty if all is well."""
    if len(session.chosen) == 0:
        text = "No expert is chosen: the base model draws alone."
    elif session.gates() is not None or len(session.chosen) == 1:
        return ""
    else:
        text = (
            "These experts have no trained gates yet, so each counts equally."
            " <b>Train</b> teaches the gates who acts where."
        )
    return f'<div class="notice">{text}</div>'


def legend(session: Session) -> str:
    """Whose colour is which."""
    if not session.chosen:
        return '<p class="hint">Choose experts first.</p>'
    dots = "".join(
        f'<span class="dot" style="--dot: {session.colour(name)}">{html.escape(name)}</span>'
        for name in session.chosen
    )
    return (
        '<p class="hint">Take an expert\'s colour with the brush and paint its place.'
        f' An expert without paint counts everywhere.</p><div class="legend">{dots}</div>'
    )


def facts(settings: PictureSettings) -> str:
    """A picture's settings as a small table."""
    experts = ", ".join(
        f"{use.name}{'' if use.strength == 1 else f' × {use.strength:g}'}"
        for use in settings.experts
        if use.active
    )
    facts = {
        "Prompt": settings.prompt,
        "Negative": settings.negative,
        "Mixture": f"{settings.mixture}{f' ({settings.gates} gates)' if settings.gates else ''}",
        "Experts": experts or "none",
        "Seed": settings.seed,
        "Steps, guidance": f"{settings.steps}, {settings.guidance:g}",
        "Size": f"{settings.width} × {settings.height}",
        "Regions": ", ".join(settings.regions),
        "Model": "" if settings.model == STARTER else settings.model,
    }
    rows = "".join(
        f"<dt>{name}</dt><dd>{html.escape(str(value))}</dd>"
        for name, value in facts.items()
        if value not in ("", None)
    )
    return f'<dl class="facts">{rows}</dl>'
