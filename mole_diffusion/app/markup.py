"""The one place where text becomes HTML.

Names, prompts and phrases come from files and from strangers. Whatever is put into a page goes through here:
`html` and `join` escape every text that is not HTML already; what they return is a `Markup`, which says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from markupsafe import Markup

from mole_diffusion.app.setup import COLOURS

_COLOUR = re.compile(r"#[0-9a-f]{6}")
_OWN_FOLDERS = re.compile(r"[^\s'\"]*/(?:mole-app-|visitor-[0-9a-f]{16})[^\s'\"]*/")
NOTHING = Markup("")


def html(template: str, *values: Any, **named: Any) -> Markup:
    """A piece of HTML.

    Args:
        template: as `str.format`, written in the code of the app and nowhere else.
        values, named: texts and numbers, which are escaped, and `Markup`, which is not.
    """
    return Markup(template).format(*values, **named)


def join(pieces: Iterable[Any], between: str = "") -> Markup:
    """Pieces one after the other; texts are escaped."""
    return Markup(between).join(pieces)


def lines(text: str) -> Markup:
    """A text of several lines."""
    return Markup("<br>").join(text.splitlines())


def text_of(error: BaseException) -> str:
    """An error's text, without the folders of the app."""
    return _OWN_FOLDERS.sub("", str(error))


def colour(value: str) -> Markup:
    """A colour inside a style; grey for what is none."""
    return Markup(value if _COLOUR.fullmatch(value) else "#7a7268")


def dot(name: str, value: str) -> Markup:
    """A name with a spot of its colour before it."""
    return html('<span class="dot" style="--dot: {}">{}</span>', colour(value), name)


def dots(names: Iterable[str], colours: Mapping[str, str] | None = None) -> Markup:
    """Names with their colours, those of the palette in turn by default."""
    known = colours or {}
    return join(dot(name, known.get(name, COLOURS[i % len(COLOURS)])) for i, name in enumerate(names))


def facts(rows: Mapping[str, Any]) -> Markup:
    """A small table of names and values; without those that are empty."""
    known = ((name, value) for name, value in rows.items() if value not in ("", None))
    cells = (html("<dt>{}</dt><dd>{}</dd>", name, value) for name, value in known)
    return html('<dl class="facts">{}</dl>', join(cells))


def notice(text: Any) -> Markup:
    """A line that should be seen; empty without a text."""
    return html('<div class="notice">{}</div>', text) if text else NOTHING


def hint(text: Any) -> Markup:
    """An explanation in small type."""
    return html('<p class="hint">{}</p>', text)
