"""Which base model a file was made for and which one is here; an expert for another base is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .architectures import TEXT_ENCODER_2, UNET
from .errors import ExpertLoadError, InjectionError
from .experts import Expert
from .factors import LoraFactors

SD1, SD2, SDXL = "Stable Diffusion 1.x", "Stable Diffusion 2.x", "Stable Diffusion XL"
# The width of the text that a UNet's cross-attention reads tells the families apart.
_FAMILY_OF_WIDTH = {768: SD1, 1024: SD2, 1280: "Stable Diffusion XL refiner", 2048: SDXL}
# Beginnings of what trainers write into `modelspec.architecture` and kohya into `ss_base_model_version`.
_FAMILY_OF_NAME = (
    ("stable-diffusion-xl-v1-refiner", "Stable Diffusion XL refiner"),
    ("stable-diffusion-xl", SDXL),
    ("sdxl", SDXL),
    ("stable-diffusion-v2", SD2),
    ("sd_v2", SD2),
    ("sd2", SD2),
    ("stable-diffusion-v1", SD1),
    ("sd_v1", SD1),
    ("sd1", SD1),
)
_PREDICTIONS = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "velocity": "v_prediction",
}
# Mismatches that an error lists; a file for another base has hundreds.
_LISTED = 3


@dataclass(frozen=True)
class Base:
    """A guess at a base model.

    Attributes:
        family: SD1, SD2, SDXL, another name that a file gives, or None.
        width: width of the text that the cross-attention reads, or None.
    """

    family: str | None
    width: int | None

    def __str__(self) -> str:
        family = self.family or "an unknown base"
        return family if self.width is None else f"{family} (cross-attention to text of width {self.width})"


def base_of_expert(expert: Expert) -> Base:
    """The base model that a file was made for, by its shapes, else by its header."""
    widths = {name: factors.matrices[0].shape[1] for name, factors in expert.factors.get(UNET, {}).items()}
    width = _text_width(widths)
    named = _named_family(expert.metadata)
    family = _FAMILY_OF_WIDTH.get(width) if width is not None else named
    if family is None and width is None and TEXT_ENCODER_2 in expert.factors:
        family = SDXL
    return Base(family or named, width)


def base_of_network(shapes: Mapping[str, tuple[int, int]]) -> Base:
    """The base model that a UNet belongs to.

    Args:
        shapes: matrix name -> (out, in).
    """
    width = _text_width({name: shape[1] for name, shape in shapes.items()})
    return Base(None if width is None else _FAMILY_OF_WIDTH.get(width), width)


def check_fit(
    expert: Expert,
    factors: Mapping[str, LoraFactors],
    shapes: Mapping[str, tuple[int, int]],
    part: str,
    network: str,
) -> None:
    """Refuse an expert that was made for another network.

    Args:
        expert: the expert.
        factors: what it has for this network, by the network's matrix names.
        shapes: the network's matrices, (out, in) with a kernel counted as input.
        part: "unet", "text_encoder" or "text_encoder_2".
        network: the network's class, for the message.
    Raises:
        InjectionError: names both bases and the first matrices that differ.
    """
    theirs, ours = base_of_expert(expert), base_of_network(shapes)
    bases = f"It was made for {theirs}; this {network} is of {ours}." if part == UNET else ""
    wrong = [
        f"{name!r}: its delta is {found[0]} x {found[1]}, the matrix {shape[0]} x {shape[1]} (out x in)"
        for name, pair in factors.items()
        if (shape := shapes.get(name)) is not None and (found := _shape(pair)) != shape
    ]
    if wrong:
        more = f"; and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
        raise InjectionError(
            f"Expert {expert.name!r} does not fit {'; '.join(wrong[:_LISTED])}{more}. {bases}".strip()
        )
    unknown = [name for name in factors if name not in shapes]
    if factors and len(unknown) == len(factors):
        raise InjectionError(
            f"Expert {expert.name!r} matches nothing in this {network}: it has {unknown[0]!r}, the network "
            f"has {next(iter(shapes))!r}. {bases}".strip()
        )
    if factors and part == UNET and theirs.family and ours.family and theirs.family != ours.family:
        raise InjectionError(f"Expert {expert.name!r} does not belong to this network. {bases}")


def prediction_type(metadata: Mapping[str, str]) -> str | None:
    """What a file's header says that the base predicts: "epsilon", "v_prediction" or None."""
    named = _PREDICTIONS.get(metadata.get("modelspec.prediction_type", "").strip().lower())
    if named is not None:
        return named
    flag = metadata.get("ss_v_parameterization", "").strip().lower()
    if flag in ("true", "false"):
        return "v_prediction" if flag == "true" else "epsilon"
    return "v_prediction" if "768-v" in metadata.get("modelspec.architecture", "") else None


def check_prediction(expert: Expert, prediction: str) -> None:
    """Refuse an expert whose header names another prediction type than the base's.

    Args:
        expert: the expert.
        prediction: the base's, as in a diffusers scheduler's config.
    Raises:
        ExpertLoadError: they differ.
    """
    named = prediction_type(expert.metadata)
    if named is not None and named != prediction:
        raise ExpertLoadError(
            f"Expert {expert.name!r} was trained on a base that predicts {named!r} (says its header, "
            f"{base_of_expert(expert)}); this base predicts {prediction!r}."
        )


def _named_family(metadata: Mapping[str, str]) -> str | None:
    for key in ("modelspec.architecture", "ss_base_model_version"):
        value = metadata.get(key, "").strip().lower()
        for beginning, family in _FAMILY_OF_NAME:
            if value.startswith(beginning):
                return family
        if value:
            return metadata[key].strip()
    return None


def _text_width(fan_ins: Mapping[str, int]) -> int | None:
    """Input width of the cross-attention's keys or values."""
    for name, width in fan_ins.items():
        if name.endswith((".attn2.to_k", ".attn2.to_v")):
            return width
    return None


def _shape(factors: LoraFactors) -> tuple[int, int]:
    down, up = factors.matrices
    return up.shape[0], down.shape[1]
