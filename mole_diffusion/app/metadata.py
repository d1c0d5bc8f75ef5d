"""The settings of a picture inside its PNG file, and out of it again."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mole_diffusion.app.infotext import read_infotext, write_infotext
from mole_diffusion.app.uploads import UNREADABLE, promised_size
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.files import replacing
from mole_diffusion.pictures.samplers import SAMPLERS
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
    "sampler": 100,
    "sampled": 100,
    "image_sha256": 64,
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
    """How an expert took part in a picture: by name and hash, with its strength.

    Attributes:
        sha256: hash of its file.
        lora_hash: what web UIs and LoRA sites tell the file by; empty if that is not known.
    """

    name: str
    sha256: str
    strength: float = 1.0
    active: bool = True
    lora_hash: str = ""

    def __post_init__(self) -> None:
        """Refuse values of the wrong kind."""
        _check_text("an expert's name", self.name, _LONGEST_NAME)
        _check_text(f"sha256 of {self.name!r}", self.sha256, 64)
        _check_text(f"lora_hash of {self.name!r}", self.lora_hash, 64)
        _check_number(f"strength of {self.name!r}", self.strength, -_MOST_STRENGTH, _MOST_STRENGTH)
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
        sampler: a name of `SAMPLERS`; "" is the model's own.
        sampled: the name of the sampler that drew it, its own too.
        image_sha256: hash of the picture that it was drawn from; "" for none.
        denoising: how much of that picture was drawn anew, 0 to 1.
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
    sampler: str = ""
    sampled: str = ""
    image_sha256: str = ""
    denoising: float = 1.0

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
        _check_number("denoising", self.denoising, 0, 1)
        if len(self.experts) > _MOST_EXPERTS:
            raise _wrong("experts", f"a list of {len(self.experts)}")
        if not isinstance(self.regions, dict) or len(self.regions) > _MOST_EXPERTS:
            raise _wrong("regions", self.regions)
        for name, text in self.regions.items():
            _check_text("an expert with a region", name, _LONGEST_NAME)
            _check_text(f"the region of {name!r}", text, _LONGEST_MASK)

    def summary(self) -> str:
        """The parameters as A1111's web UI writes them, for image viewers and other programs."""
        used = [use for use in self.experts if use.active]
        hashes = ", ".join(f"{use.name}: {use.lora_hash}" for use in used if use.lora_hash)
        parameters: dict[str, object] = {
            "Steps": self.steps,
            "Sampler": self.sampled or self.sampler,
            "CFG scale": f"{self.guidance:g}",
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Model": Path(self.model).stem,
            "Denoising strength": f"{self.denoising:g}" if self.image_sha256 else "",
            "Lora hashes": hashes,
            "MoLE mixture": self.mixture,
            "MoLE experts": ", ".join(f"{use.name} {use.strength:g}" for use in used),
            "MoLE gates": self.gates_sha256[:12],
        }
        known = {name: value for name, value in parameters.items() if value != ""}
        return write_infotext(self.prompt, self.negative, known)

    @classmethod
    def from_infotext(cls, text: str) -> PictureSettings:
        """What a picture of A1111's web UI or of Forge says, as far as it can be drawn here.

        Raises:
            ConfigError: there are no parameters in it.
        """
        found = read_infotext(text)
        said = found.parameters
        size = re.fullmatch(r"(\d+)x(\d+)", said.get("Size", ""))
        try:
            width, height = (int(size[1]), int(size[2])) if size else (0, 0)
            return cls(
                prompt=found.prompt,
                negative=found.negative,
                seed=int(said.get("Seed", 0)),
                steps=int(said["Steps"]),
                guidance=float(said.get("CFG scale", GUIDANCE)),
                width=width - width % 8,
                height=height - height % 8,
                model=said.get("Model", ""),
                mixture="la" if found.loras else "gates",
                sampler=_sampler_of(said.get("Sampler", "")),
                experts=tuple(
                    ExpertUse(name=name, sha256="", strength=strength)
                    for name, strength in found.loras.items()
                ),
            )
        except ValueError as error:
            raise ConfigError(f"the picture's parameters cannot be read: {error}") from error


def _sampler_of(said: str) -> str:
    """The sampler that is meant, schedules left aside ("DPM++ 2M Karras"); empty for one that is not here."""
    return next((name for name in sorted(SAMPLERS, key=len, reverse=True) if said.startswith(name)), "")


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
            text, parameters = picture.info.get(KEY), picture.info.get("parameters")
    except UNREADABLE as error:
        raise ConfigError(f"{Path(path).name!r} cannot be read as a picture") from error
    if isinstance(text, str):
        return PictureSettings.from_json(text)
    if isinstance(parameters, str) and parameters.strip():
        return PictureSettings.from_infotext(parameters)
    raise ConfigError(
        f"{Path(path).name!r} carries no settings: PNG files of this app, of `mole generate` and of A1111's"
        " web UI do, unchanged"
    )


def image_digest(image: Image.Image) -> str:
    """What the picture that another was begun from is told by."""
    return sha256(image.tobytes()).hexdigest()


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
