"""The settings of a picture inside its PNG file, and out of it again."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.files import replacing
from mole_diffusion.starter.location import GUIDANCE

KEY = "mole_diffusion"
FORMAT_VERSION = 1
#: What the fields of a picture's settings hold; files come from anywhere.
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("prompt", "negative", "mixture", "model", "gates", "gates_sha256"), (str,)),
    **dict.fromkeys(("seed", "steps", "width", "height"), (int,)),
    "guidance": (int, float),
    "regions": (dict,),
}


@dataclass(frozen=True, kw_only=True)
class ExpertUse:
    """How an expert took part in a picture: by name and hash, with its strength."""

    name: str
    sha256: str
    strength: float = 1.0
    active: bool = True


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
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"the picture's settings cannot be read: {error}") from error
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"the picture's settings have format_version {version!r}; this version reads {FORMAT_VERSION}"
            )
        return settings

    def __post_init__(self) -> None:
        for name, kinds in _KINDS.items():
            value = getattr(self, name)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise ConfigError(f"the picture's settings cannot be read: {name} is {value!r}")

    def summary(self) -> str:
        """The parameters as one line of text, as image viewers and other programs show them."""
        experts = ", ".join(f"{use.name} {use.strength:g}" for use in self.experts if use.active)
        negative = f"\nNegative prompt: {self.negative}" if self.negative else ""
        return (
            f"{self.prompt}{negative}\nSteps: {self.steps}, CFG scale: {self.guidance:g}, Seed: {self.seed},"
            f" Size: {self.width}x{self.height}, Model: {self.model}, Mixture: {self.mixture},"
            f' MoLE experts: "{experts}"'
        )


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
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise ConfigError(f"{Path(path).name!r} cannot be read as a picture") from error
    if not isinstance(text, str):
        raise ConfigError(
            f"{Path(path).name!r} carries no settings: only PNG files saved by this app do, unchanged"
        )
    return PictureSettings.from_json(text)


def mask_to_text(mask: Image.Image) -> str:
    """A region mask as base64 of a small PNG."""
    stream = io.BytesIO()
    mask.convert("1").save(stream, format="PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode("ascii")


def mask_from_text(text: str) -> Image.Image:
    """The reverse of `mask_to_text`.

    Raises:
        ConfigError: not such a text.
    """
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True))) as mask:
            return mask.convert("L")
    except (ValueError, UnidentifiedImageError, OSError) as error:
        raise ConfigError("a region in the picture's settings cannot be read") from error
