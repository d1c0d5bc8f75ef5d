"""Which base model a file was made for and which one is here; an expert for another base is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from .errors import ExpertLoadError, InjectionError
from .experts import Expert
from .factors import LoraFactors
from .modules import base_layer, matrix_shape
from .networks import by_name, find_network, of_matrices
from .networks.base import DENOISER, Architecture, Base, NetworkMap
from .networks.families import SDXL, named_family

_PREDICTIONS = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "velocity": "v_prediction",
}
#: Entries of headers with the name of the model that a file was trained on.
_MODEL_NAMES = ("ss_sd_model_name", "ss_base_model", "modelspec.base_model", "base_model", "sd_model_name")
#: Descendants of SDXL whose LoRAs suit each other and plain SDXL only in part, by what their names have.
_DESCENDANTS = {
    "Illustrious": re.compile(r"illustrious", re.IGNORECASE),
    "NoobAI": re.compile(r"noob", re.IGNORECASE),
    "Pony": re.compile(r"pony(?!.?tail)", re.IGNORECASE),
    "Animagine": re.compile(r"animagine", re.IGNORECASE),
}
# Mismatches that an error lists; a file for another base has hundreds.
_LISTED = 3


def base_of_expert(expert: Expert) -> Base:
    """The base model that a file was made for, by the shapes for its denoiser, else by its header."""
    told: dict[bool, Base] = {}
    for slot, factors in expert.factors.items():
        architecture = _architecture(expert, slot)
        if architecture is None:
            continue
        inputs = {name: pair.matrices[0].shape[1] for name, pair in factors.items()}
        base = architecture.family(slot, inputs)
        if base is not None:
            told.setdefault(architecture.role == DENOISER, base)
    base = told.get(True, Base(None, None))
    family = base.family or named_family(expert.metadata)
    if family is None and base.width is None and False in told:
        family = told[False].family
    return Base(family, base.width)


def descendant(metadata: Mapping[str, str]) -> str | None:
    """Which descendant of SDXL (Illustrious, Pony, ...) a header names as the model it was trained on.

    Their matrices have SDXL's shapes, so that nothing else in a file tells them apart.
    """
    for key in _MODEL_NAMES:
        for name, words in _DESCENDANTS.items():
            if words.search(metadata.get(key, "")):
                return name
    return None


def told_base(expert: Expert) -> str:
    """The base model that a file was made for, in words, with the descendant that its header names."""
    base = base_of_expert(expert)
    named = descendant(expert.metadata) if base.family == SDXL else None
    return str(base) if named is None else f"{base}; {named}, says its header"


def base_of_networks(networks: Mapping[str, nn.Module]) -> Base | None:
    """The base model that a model's denoiser belongs to; None where there is none of a known kind.

    Args:
        networks: by part.
    """
    for part, network in networks.items():
        layout = find_network(network, part)
        if layout is not None and layout.role == DENOISER:
            modules = {site.name: base_layer(network.get_submodule(site.path)) for site in layout.sites}
            return _base(layout, {name: matrix_shape(module)[1] for name, module in modules.items()})
    return None


def check_fit(
    expert: Expert,
    factors: Mapping[str, LoraFactors],
    shapes: Mapping[str, tuple[int, int]],
    layout: NetworkMap,
    network: str,
) -> None:
    """Refuse an expert that was made for another network.

    Args:
        expert: the expert.
        factors: what it has for this network, by the network's matrix names.
        shapes: the network's matrices, (out, in) with a kernel counted as input.
        layout: what the network is.
        network: the network's class, for the message.
    Raises:
        InjectionError: names both bases and the first matrices that differ.
    """
    theirs, ours = base_of_expert(expert), _base(layout, {name: shape[1] for name, shape in shapes.items()})
    told = layout.role == DENOISER
    bases = f"It was made for {theirs}; this {network} is of {ours}." if told else ""
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
    if factors and told and theirs.family and ours.family and theirs.family != ours.family:
        raise InjectionError(f"Expert {expert.name!r} does not belong to this network. {bases}")


def prediction_type(metadata: Mapping[str, str]) -> str | None:
    """What a file's header says that the base predicts: "epsilon", "v_prediction" or None."""
    # The second is what our own exports and merges have.
    for key in ("modelspec.prediction_type", "prediction_type"):
        named = _PREDICTIONS.get(metadata.get(key, "").strip().lower())
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


def _architecture(expert: Expert, slot: str) -> Architecture | None:
    """The kind of network that an expert's matrices for a slot belong to."""
    return by_name(expert.architectures.get(slot, "")) or of_matrices(expert.factors[slot])


def _base(layout: NetworkMap, inputs: Mapping[str, int]) -> Base:
    """As `Architecture.family`; where nothing tells, a kind of denoiser of one family alone does."""
    kind = layout.architecture
    base = kind.family(layout.part, inputs)
    if base is None and kind.role == DENOISER and len(kind.families) == 1:
        return Base(kind.families[0], None)
    return base or Base(None, None)


def _shape(factors: LoraFactors) -> tuple[int, int]:
    down, up = factors.matrices
    return up.shape[0], down.shape[1]
