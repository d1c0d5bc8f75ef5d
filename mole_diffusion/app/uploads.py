"""Which files the app takes: safetensors and pictures, by what is in them and not by their name.

Files come from anywhere. Nothing here costs more time or memory than its limits say, and what is wrong with a
file is said in the app's own words.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError, safe_open

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.reading import foreign_kind

MAX_FILE_BYTES = 2 * 2**30
MAX_PICTURE_BYTES = 32 * 2**20
MAX_PICTURE_PIXELS = 40_000_000
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LORA_SUFFIXES = (".safetensors",)
#: LoRAs with thousands of matrices and all their trainer's notes have a tenth of it.
MAX_HEADER_BYTES = 16 * 2**20
#: What Pillow raises for pictures that it cannot or would not read.
UNREADABLE = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    OverflowError,
)


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
    """The header is there, is one of tensors and lies inside the file, as they do."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(16)
        foreign = foreign_kind(head)
        if foreign is not None:
            raise ConfigError(f"{path.name!r} is no safetensors file: {foreign}")
        length = int.from_bytes(head[:8], "little")
        if not 2 <= length <= size - 8:
            raise ConfigError(f"{path.name!r} is no safetensors file: it has no header")
        if length > MAX_HEADER_BYTES:
            raise ConfigError(
                f"{path.name!r} has a header of {length / 2**20:.0f} MB;"
                f" the app takes LoRAs with headers of up to {MAX_HEADER_BYTES // 2**20} MB"
            )
    try:
        # Not json: it holds up all threads of the app, ten times as long.
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path.name!r} is no safetensors file: its header cannot be read") from error


def _check_picture(path: Path) -> None:
    size = path.stat().st_size
    if size > MAX_PICTURE_BYTES:
        raise ConfigError(
            f"{path.name!r} has {size / 2**20:.0f} MB; pictures may have {MAX_PICTURE_BYTES // 2**20} MB"
        )
    # Before Pillow: it makes room for a whole WebP when it opens it.
    with path.open("rb") as file:
        _check_pixels(path.name, *promised_size(file.read(32)))
    try:
        with Image.open(path) as picture:
            kind, (width, height) = picture.format, picture.size
            picture.verify()
    except Image.DecompressionBombError as error:
        raise ConfigError(f"{path.name!r} has far too many pixels; {_LIMIT}") from error
    except UNREADABLE as error:
        raise ConfigError(f"{path.name!r} cannot be read as a picture") from error
    if kind not in ("PNG", "JPEG", "WEBP"):
        raise ConfigError(f"{path.name!r} is a {kind} picture; allowed are PNG, JPEG and WebP")
    _check_pixels(path.name, width, height)


_LIMIT = f"allowed are {MAX_PICTURE_PIXELS // 10**6}"


def _check_pixels(name: str, width: int, height: int) -> None:
    if width * height > MAX_PICTURE_PIXELS:
        raise ConfigError(f"{name!r} has {width * height / 1e6:.0f} megapixels; {_LIMIT}")


def promised_size(head: bytes) -> tuple[int, int]:
    """Width and height that the first bytes of a PNG or WebP file promise; (0, 0) of other files."""
    if head[:8] == b"\x89PNG\r\n\x1a\n" and len(head) >= 24:
        return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP" or len(head) < 30:
        return 0, 0
    if head[12:16] == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF
