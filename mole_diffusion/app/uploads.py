"""Which files the app takes: safetensors and pictures, by what is in them and not by their name."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.reading import BadFileError, read_header

MAX_FILE_BYTES = 2 * 2**30
MAX_PICTURE_BYTES = 32 * 2**20
MAX_PICTURE_PIXELS = 40_000_000
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LORA_SUFFIXES = (".safetensors",)


def check_upload(path: Path) -> str:
    """Look at an uploaded file.

    Returns:
        "safetensors" or "picture".

    Raises:
        ConfigError: it is neither, or too large.
    """
    suffix = path.suffix.lower()
    if suffix in LORA_SUFFIXES:
        _check_safetensors(path)
        return "safetensors"
    if suffix in PICTURE_SUFFIXES:
        _check_picture(path)
        return "picture"
    raise ConfigError(
        f"{path.name!r} is not taken: the app takes {', '.join((*LORA_SUFFIXES, *PICTURE_SUFFIXES))} files"
    )


def _check_safetensors(path: Path) -> None:
    """The header is there, can be read and describes the rest of the file."""
    try:
        read_header(path)
    except (BadFileError, OSError) as error:
        raise ConfigError(f"{path.name!r} is no safetensors file: {error}") from error


def _check_picture(path: Path) -> None:
    size = path.stat().st_size
    if size > MAX_PICTURE_BYTES:
        raise ConfigError(
            f"{path.name!r} has {size / 2**20:.0f} MB; pictures may have {MAX_PICTURE_BYTES // 2**20} MB"
        )
    try:
        with Image.open(path) as picture:
            kind, pixels = picture.format, picture.width * picture.height
            picture.verify()
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise ConfigError(f"{path.name!r} cannot be read as a picture") from error
    if kind not in ("PNG", "JPEG", "WEBP"):
        raise ConfigError(f"{path.name!r} is a {kind} picture; allowed are PNG, JPEG and WebP")
    if pixels > MAX_PICTURE_PIXELS:
        raise ConfigError(
            f"{path.name!r} has {pixels / 1e6:.0f} megapixels; allowed are {MAX_PICTURE_PIXELS / 1e6:.0f}"
        )
