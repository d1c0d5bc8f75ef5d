"""Picture files, and telling pictures apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.files import replacing

#: Endings of picture files that are read and written.
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def open_picture(path: str | Path) -> Image.Image:
    """A picture file as RGB, read to its end.

    Raises:
        ConfigError: it cannot be read as a picture; the file is named.
    """
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read as a picture: {error}") from error


def write_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture in the format of its ending; it appears whole or not at all.

    Raises:
        WriteError: nothing can be written there.
    """
    kind = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.get(path.suffix.lower(), "PNG")
    with replacing(path) as temporary:
        picture.save(temporary, format=kind)


def pictures_in(folder: str | Path) -> list[Path]:
    """The picture files in a folder by name; none if there is no such folder."""
    return sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in PICTURES)


def read_pictures(folder: str | Path) -> list[Image.Image]:
    """The pictures in a folder by name; none if there is no such folder.

    Raises:
        ConfigError: a file cannot be read as a picture.
    """
    return [open_picture(path) for path in pictures_in(folder)]


def pictures_digest(pictures: Iterable[Image.Image], captions: Sequence[str] | None = None) -> str:
    """A hash of pictures, and of a caption for each where there are some."""
    digest = hashlib.sha256()
    for i, picture in enumerate(pictures):
        caption = "" if captions is None else f" {captions[i]}\n"
        digest.update(f"{picture.mode} {picture.size}{caption}".encode())
        digest.update(picture.tobytes())
    return digest.hexdigest()
