"""Where the text starter lies, and its experts."""

from __future__ import annotations

from pathlib import Path

from mole_diffusion.core.errors import UnknownExpertError
from mole_diffusion.starter.location import starter_dir

#: The folder inside the starter.
TEXT = "text"


def text_starter() -> Path:
    """The folder of the model; it need not exist yet: `tools.starter_text` makes it."""
    return starter_dir() / TEXT


def text_experts(folder: Path | None = None) -> dict[str, Path]:
    """Name -> PEFT folder of each expert of the text starter."""
    inside = (folder or text_starter()) / "experts"
    return {path.name: path for path in sorted(inside.glob("*")) if path.is_dir()}


def text_expert(name: str, folder: Path | None = None) -> Path:
    """The PEFT folder of one expert.

    Raises:
        UnknownExpertError: there is none of this name.
    """
    known = text_experts(folder)
    if name not in known:
        raise UnknownExpertError(name, list(known))
    return known[name]
