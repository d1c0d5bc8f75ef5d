"""Pieces of the Compose tab as HTML."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from mole_diffusion.app import markup
from mole_diffusion.app.metadata import PictureSettings
from mole_diffusion.app.session import Session
from mole_diffusion.methods import METHODS
from mole_diffusion.starter.location import STARTER

#: Pictures that the gallery shows at once.
SHOWN = 64


def gallery(session: Session) -> list[tuple[str, str]]:
    """The newest pictures with their captions."""
    return [
        (str(picture.path), f"{label_of(picture.settings)} · seed {picture.settings.seed}")
        for picture in session.pictures[:SHOWN]
    ]


def notice(session: Session) -> Markup:
    """What somebody should know before drawing; empty if all is well."""
    if len(session.chosen) == 0:
        return markup.notice("No expert is chosen: the base model draws alone.")
    if session.gates() is not None or len(session.chosen) == 1:
        return markup.NOTHING
    text = (
        "These experts have no trained gates yet: words and places find them by the prompt (auto)."
        " <b>Train</b> makes gates that know who acts where, in minutes."
    )
    return markup.notice(markup.html(text))


def not_named(missing: Mapping[str, str]) -> Markup:
    """Which experts the prompt does not name; they hardly show then."""
    if not missing:
        return markup.NOTHING
    phrases = ", ".join(f"“{phrase}”" for phrase in missing.values())
    return markup.notice(markup.html("The prompt does not name <b>{}</b>: {}.", ", ".join(missing), phrases))


def facts(settings: PictureSettings) -> Markup:
    """A picture's settings as a small table."""
    experts = ", ".join(
        f"{use.name}{'' if use.strength == 1 else f' × {use.strength:g}'}"
        for use in settings.experts
        if use.active
    )
    return markup.facts(
        {
            "Prompt": settings.prompt,
            "Negative": settings.negative,
            "Mixture": _mixture(settings),
            "Experts": experts or "none",
            "Seed": settings.seed,
            "Sampler": settings.sampled,
            "Begun from": f"a picture, {settings.denoising:.0%} drawn anew" if settings.image_sha256 else "",
            "Steps, guidance": f"{settings.steps}, {settings.guidance:g}",
            "Size": f"{settings.width} × {settings.height}",
            "Regions": ", ".join(settings.regions),
            "Model": "" if settings.model == STARTER else settings.model,
        }
    )


def _mixture(settings: PictureSettings) -> str:
    """What mixed the experts, and where there were no gates how to get some."""
    if settings.mixture == "auto":
        return "auto: by the prompt, no training; Train makes gates for these experts in minutes"
    return f"{label_of(settings)}{f' ({settings.gates})' if settings.gates else ''}"


def label_of(settings: PictureSettings) -> str:
    """The name of what mixed the experts; a dropped picture may name what this version does not know."""
    return METHODS[settings.mixture].label if settings.mixture in METHODS else settings.mixture
