"""The state of a visitor's page: what its controls hold, kept with the session for the next load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mole_diffusion.app.metadata import image_digest
from mole_diffusion.app.session import Picture, Session
from mole_diffusion.core.phrases import listed, unnamed
from mole_diffusion.pictures.files import open_picture, write_picture
from mole_diffusion.starter.location import GUIDANCE, STARTER

#: What suits other models than the starter.
_GUIDANCE = 7.5
#: Control -> what it holds at first. The prompt is that of all tabs.
FIRST: dict[str, Any] = {
    "prompt": "",
    "negative": "",
    "mixture": "gates",
    "seed": 0,
    "steps": 25,
    "guidance": GUIDANCE,
    "width": 0,
    "height": 0,
    "sampler": "",
    "count": 1,
    "denoising": 0.6,
    "beside": False,
}


def controls(session: Session) -> dict[str, Any]:
    """What the controls of Compose hold; of the right kinds, whatever was kept."""
    firsts = {**FIRST, "guidance": GUIDANCE if session.model == STARTER else _GUIDANCE}
    kept = {name: session.page.get(name, first) for name, first in firsts.items()}
    found = {
        name: value if isinstance(value, type(FIRST[name])) or _number(value, FIRST[name]) else FIRST[name]
        for name, value in kept.items()
    }
    return {**found, "prompt": found["prompt"] or suggested_prompt(session)}


def take(session: Session, held: Mapping[str, Any], **more: Any) -> None:
    """What the controls hold is the page's state from now on.

    Args:
        session: whose.
        held: by the names of `FIRST`.
        more: what else is known of the page now; all of it is written down at once.
    """
    kept = {name: value for name, value in held.items() if name in FIRST and value is not None}
    session.set_page(**kept, **more)


def suggested_prompt(session: Session) -> str:
    """ "a zorin boot, a vekka monster and a kipra clock on the beach", for the chosen experts."""
    texts = [card.text for card in session.cards if card.text and card.kind == "concept"]
    styles = [card.text for card in session.cards if card.text and card.kind == "style"]
    if not texts:
        return " ".join(styles)
    return " ".join([listed(texts), "on the beach", *styles])


def choose(session: Session, names: tuple[str, ...], prompt: str) -> str:
    """Choose experts; a prompt that was suggested for those from before is suggested anew, others stay.

    Returns:
        The prompt.

    Raises:
        MoLEError: see `Session.choose`.
    """
    before = suggested_prompt(session)
    session.choose(names)
    renewed = suggested_prompt(session) if prompt.strip() in ("", before) else prompt
    session.set_page(prompt=renewed)
    return renewed


def carried(session: Session, tab: str, current: str) -> str:
    """The prompt for another tab: that of Compose, unless the user wrote another one there.

    Args:
        session: whose.
        tab: the tab's name.
        current: what stands there now.
    """
    if is_own(session, tab, current):
        return current
    found = str(controls(session)["prompt"])
    session.set_page(carried={**session.page.get("carried", {}), tab: found})
    return found


def is_own(session: Session, tab: str, current: str) -> bool:
    """Whether a tab's prompt is not the one that was carried there.

    What changes the session asks before it does: another event may carry the new prompt there in between.
    """
    return bool(current.strip()) and current != session.page.get("carried", {}).get(tab)


def missing_phrases(session: Session, prompt: str, active: tuple[str, ...] | None = None) -> dict[str, str]:
    """The chosen experts that a prompt does not name: expert -> the phrase to write for it."""
    phrases = {
        card.name: [card.text]
        for card in session.cards
        if card.text and (active is None or card.name in active)
    }
    return unnamed(prompt, phrases)


def with_phrases(prompt: str, phrases: list[str]) -> str:
    """The prompt with these phrases at its beginning."""
    rest = prompt.strip().lstrip(",").strip()
    return ", ".join([listed(phrases), rest] if rest else [listed(phrases)])


def show_pictures(session: Session, pictures: list[Picture]) -> None:
    """These are shown from now on: one, and another of the same seed beside it."""
    session.set_page(shown=[picture.path.name for picture in pictures[:2]])


def shown_pictures(session: Session) -> list[Picture]:
    """The picture that is shown, and the one beside it; the newest where nothing was chosen."""
    names = session.page.get("shown")
    by_name = {picture.path.name: picture for picture in session.pictures}
    found = [by_name[name] for name in names if name in by_name] if isinstance(names, list) else []
    return found or session.pictures[:1]


def ground(session: Session) -> Path | None:
    """The picture that regions are painted over."""
    name = session.page.get("ground")
    return next((picture.path for picture in session.pictures if picture.path.name == name), None)


def begun_from(session: Session) -> Path | None:
    """The picture that new ones begin from."""
    name = session.page.get("begin")
    path = session.folder / "begin" / str(name)
    return path if isinstance(name, str) and Path(name).name == name and path.is_file() else None


def begun_digest(session: Session) -> str:
    """What that picture is told by, as in the settings of pictures; empty for none."""
    path = begun_from(session)
    return "" if path is None else image_digest(open_picture(path))


def begin_from(session: Session, image: Image.Image | None) -> None:
    """New pictures begin from this one, or from noise; it is kept with the session."""
    if begun_digest(session) == ("" if image is None else image_digest(image)):
        return
    before = begun_from(session)
    path = None if image is None else session.new_path("begin", ".png")
    if image is not None and path is not None:
        write_picture(image, path)
    session.set_page(begin=path.name if path else "")
    if before is not None:
        before.unlink(missing_ok=True)


def _number(value: Any, first: Any) -> bool:
    numbers = (int, float)
    return isinstance(first, numbers) and isinstance(value, numbers) and not isinstance(first, bool)
