"""The settings of a picture inside its PNG file, and out of it again."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mole_diffusion.app.uploads import UNREADABLE, promised_size
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.files import replacing
from mole_diffusion.starter.location import GUIDANCE

KEY = "mole_diffusion"
FORMAT_VERSION = 1
#: What the fields of a picture's settings may hold; files come from anywhere.
_TEXTS = {
    "prompt": 20_000,
    "negative": 20_000,
    "mixture": 100,
    "model": 4_000,
    "gates": 100,
    "gates_sha256": 64,
}
_WHOLE = {"seed": (0, 2**32 - 1), "steps": (1, 10_000), "width": (0, 16_384), "height": (0, 16_384)}
_MOST_GUIDANCE, _MOST_STRENGTH = 1_000.0, 1_000.0
_MOST_EXPERTS, _LONGEST_NAME = 64, 200
#: Base64 of the PNG of a mask, and what it may unfold to.
_LONGEST_MASK, _MOST_PIXELS = 2 * 2**20, 4096 * 4096
#: Pixels to a side of masks as they are kept.
_MASK_SIDE = 1024


@dataclass(frozen=True, kw_only=True)
class ExpertUse:
    """How an expert took part in a picture: by name and hash, with its strength."""

    name: str
    sha256: str
    strength: float = 1.0
    active: bool = True

    def __post_init__(self) -> None:
        """Refuse values of the wrong kind."""
        _check_text("an expert's name", self.name, _LONGEST_NAME)
        _check_text(f"sha256 of {self.name!r}", self.sha256, 64)
        _check_number(f"strength of {self.name!r}", self.strength, 0, _MOST_STRENGTH)
        if not isinstance(self.active, bool):
            raise _wrong(f"active of {self.name!r}", self.active)


@dataclass(frozen=True, kw_only=True)
class PictureSettings:
    """Everything that a picture was drawn from.

    Attributes:
        model: "starter", or what the user named.
        gates: what made the weights: "trained", "partly trained", "fresh", or "" where no gate took part.
        gates_sha256: hash of the gates file, "" where there is none.
        regions: expert name -> PNG of the region mask, base64.
    """

    prompt: str
    negative: str = ""
    seed: int = 0
    steps: int = 25
    guidance: float = GUIDANCE
    width: int = 128
    height: int = 128
    mixture: str = "gates"
    model: str = "starter"
    gates: str = ""
    gates_sha256: str = ""
    experts: tuple[ExpertUse, ...] = ()
    regions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """All fields as one line of JSON."""
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> PictureSettings:
        """The reverse of `to_json`.

        Raises:
            ConfigError: not such settings, or of a newer version.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            version = values.pop("format_version")
            experts = tuple(ExpertUse(**entry) for entry in values.pop("experts"))
            settings = cls(**values, experts=experts)
        except ConfigError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise ConfigError(f"the picture's settings cannot be read: {error}") from error
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"the picture's settings have format_version {version!r}; this version reads {FORMAT_VERSION}"
            )
        return settings

    def __post_init__(self) -> None:
        """Refuse values of the wrong kind."""
        for name, longest in _TEXTS.items():
            _check_text(name, getattr(self, name), longest)
        for name, (low, high) in _WHOLE.items():
            _check_whole(name, getattr(self, name), low, high)
        _check_number("guidance", self.guidance, 0, _MOST_GUIDANCE)
        if len(self.experts) > _MOST_EXPERTS:
            raise _wrong("experts", f"a list of {len(self.experts)}")
        if not isinstance(self.regions, dict) or len(self.regions) > _MOST_EXPERTS:
            raise _wrong("regions", self.regions)
        for name, text in self.regions.items():
            _check_text("an expert with a region", name, _LONGEST_NAME)
            _check_text(f"the region of {name!r}", text, _LONGEST_MASK)

    def summary(self) -> str:
        """The parameters as one line of text, as image viewers and other programs show them."""
        experts = ", ".join(f"{use.name} {use.strength:g}" for use in self.experts if use.active)
        negative = f"\nNegative prompt: {self.negative}" if self.negative else ""
        return (
            f"{self.prompt}{negative}\nSteps: {self.steps}, CFG scale: {self.guidance:g}, Seed: {self.seed},"
            f" Size: {self.width}x{self.height}, Model: {self.model}, Mixture: {self.mixture},"
            f' MoLE experts: "{experts}"'
        )


def _wrong(name: str, value: Any) -> ConfigError:
    shown = "too large" if isinstance(value, int) and abs(value) >= 10**20 else repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return ConfigError(f"the picture's settings cannot be read: {name} is {shown}")


def _check_text(name: str, value: Any, longest: int) -> None:
    if not isinstance(value, str) or len(value) > longest:
        raise _wrong(name, value)


def _check_whole(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _wrong(name, value)


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    # Not a number is not between any two.
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
        raise _wrong(name, value)


def save_picture(picture: Image.Image, path: Path, settings: PictureSettings) -> None:
    """Write a PNG with its settings in the header; it appears whole or not at all."""
    info = PngInfo()
    info.add_text(KEY, settings.to_json())
    info.add_text("parameters", settings.summary())
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=info)


def read_settings(path: str | Path) -> PictureSettings:
    """The settings in a PNG file.

    Raises:
        ConfigError: no picture, or a picture without settings.
    """
    try:
        with Image.open(path) as picture:
            text = picture.info.get(KEY)
    except UNREADABLE as error:
        raise ConfigError(f"{Path(path).name!r} cannot be read as a picture") from error
    if not isinstance(text, str):
        raise ConfigError(
            f"{Path(path).name!r} carries no settings: only PNG files saved by this app do, unchanged"
        )
    return PictureSettings.from_json(text)


def mask_to_text(mask: Image.Image) -> str:
    """A region mask as base64 of a small PNG."""
    if max(mask.size) > _MASK_SIDE:
        scale = _MASK_SIDE / max(mask.size)
        size = (max(round(mask.width * scale), 1), max(round(mask.height * scale), 1))
        mask = mask.convert("L").resize(size, Image.Resampling.BILINEAR)
    stream = io.BytesIO()
    mask.convert("1", dither=Image.Dither.NONE).save(stream, format="PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode("ascii")


def mask_from_text(text: str) -> Image.Image:
    """The reverse of `mask_to_text`.

    Raises:
        ConfigError: not such a text, or a mask of too many pixels.
    """
    said = "a region in the picture's settings cannot be read"
    if len(text) > _LONGEST_MASK:
        raise ConfigError(f"{said}: it has {len(text) / 2**20:.1f} MB")
    try:
        content = base64.b64decode(text, validate=True)
        width, height = promised_size(content)
        if width * height > _MOST_PIXELS:
            raise ConfigError(f"{said}: it has {width} x {height} pixels")
        with Image.open(io.BytesIO(content), formats=("PNG",)) as mask:
            return mask.convert("L")
    except ConfigError:
        raise
    except UNREADABLE as error:
        raise ConfigError(said) from error
