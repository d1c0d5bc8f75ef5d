"""What a visitor has, in a file beside the pictures: it is there again when the server starts anew."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mole_diffusion.app.setup import ExpertCard, Gates
from mole_diffusion.core.files import replacing
from mole_diffusion.starter.location import starter_dir

logger = logging.getLogger(__name__)

FILE = "session.json"
FORMAT_VERSION = 1
_STARTER = "<starter>/"


@dataclass
class Kept:
    """What outlives the server.

    Attributes:
        model: the base model.
        library: the experts by name.
        chosen: those in use.
        gates: by the files of their experts.
        page: what the controls of the page hold, as plain values.
        training: the last training, as plain values.
        shared: shared gates that the visitor brought.
    """

    model: str
    library: dict[str, ExpertCard] = field(default_factory=dict)
    chosen: tuple[str, ...] = ()
    gates: dict[tuple[Path, ...], Gates] = field(default_factory=dict)
    page: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] | None = None
    shared: Gates | None = None


def write(folder: Path, kept: Kept) -> None:
    """Write what is kept into a visitor's folder; whole or not at all."""
    values = {
        "format_version": FORMAT_VERSION,
        "model": kept.model,
        "library": [_packed(asdict(card), folder) for card in kept.library.values()],
        "chosen": kept.chosen,
        "gates": [
            {"experts": _packed(list(key), folder), **_packed(vars_of(gates), folder)}
            for key, gates in kept.gates.items()
        ],
        "page": kept.page,
        "training": _packed(kept.training, folder),
        "shared": None if kept.shared is None else packed_path(kept.shared.path, folder),
    }
    with replacing(folder / FILE) as temporary:
        temporary.write_text(json.dumps(values, indent=1), encoding="utf-8")


def read(folder: Path) -> Kept | None:
    """The reverse of `write`; None where there is nothing, or nothing that can be read."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version is {values['format_version']!r}")
        cards = [_card(entry, folder) for entry in values["library"]]
        shared = values.get("shared")  # a file may be older
        return Kept(
            str(values["model"]),
            {card.name: card for card in cards if card.path.exists()},
            tuple(values["chosen"]),
            dict(_gates(entry, folder) for entry in values["gates"]),
            dict(values["page"]),
            values["training"],
            None if shared is None else Gates(unpacked_path(shared, folder)),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        logger.warning("%s cannot be read (%s): that visitor begins anew", path, error)
        return None


def vars_of(gates: Gates) -> dict[str, Any]:
    """The fields of gates; a hash that was computed meanwhile is none."""
    return {"path": gates.path, "iterations": gates.iterations, "wanted": gates.wanted}


def packed_path(path: Path, folder: Path) -> str:
    """A path as text that stays right when the folder, or the installation, moves."""
    for root, mark in ((folder, ""), (starter_dir(), _STARTER)):
        if root in path.parents:
            return mark + path.relative_to(root).as_posix()
    return str(path)


def unpacked_path(text: str, folder: Path) -> Path:
    """The reverse of `packed_path`."""
    if text.startswith(_STARTER):
        return starter_dir() / text.removeprefix(_STARTER)
    return folder / text


def _packed(value: Any, folder: Path) -> Any:
    if isinstance(value, Path):
        return packed_path(value, folder)
    if isinstance(value, Mapping):
        return {name: _packed(entry, folder) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_packed(entry, folder) for entry in value]
    return value


def _card(entry: dict[str, Any], folder: Path) -> ExpertCard:
    references = tuple(unpacked_path(text, folder) for text in entry.pop("references"))
    picture = entry.pop("picture")
    path = unpacked_path(entry.pop("path"), folder)
    return ExpertCard(
        path=path,
        picture=unpacked_path(picture, folder) if picture else None,
        references=tuple(reference for reference in references if reference.is_file()),
        **entry,
    )


def _gates(entry: dict[str, Any], folder: Path) -> tuple[tuple[Path, ...], Gates]:
    key = tuple(unpacked_path(text, folder) for text in entry["experts"])
    path = unpacked_path(entry["path"], folder)
    return tuple(sorted(key)), Gates(path, int(entry["iterations"]), int(entry["wanted"]))
