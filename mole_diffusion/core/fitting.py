"""Experts' factors on the matrices of one network, and what tells the network from others."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .bases import check_fit
from .errors import InjectionError
from .experts import Expert
from .factors import LoraFactors
from .matrices import MatrixSlot
from .modules import base_layer, kernel_size, site_shape
from .networks.base import ATTENTION, NetworkMap, Site

logger = logging.getLogger(__name__)


def fingerprint(network: nn.Module, layout: NetworkMap) -> dict[str, str]:
    """What a network is: its class, and hashes of its matrices' canonical names and shapes.

    Returns:
        "class"; "shapes" of the transformers' matrices, which files of format 1 have; "matrices" of all.
    """
    sites = [site for site in layout.sites if site.identifies]
    transformers = [site for site in sites if site.kind == ATTENTION]
    return {
        "class": type(network).__name__,
        "shapes": _hash_shapes(network, transformers, site_shape),
        "matrices": _hash_shapes(network, sites, _delta_shape),
    }


def _hash_shapes(
    network: nn.Module,
    sites: Sequence[Site],
    shape_of: Callable[[nn.Module, slice | None], tuple[int, int]],
) -> str:
    digest = hashlib.sha256()
    for site in sorted(sites, key=lambda site: site.name):
        shape = shape_of(base_layer(network.get_submodule(site.path)), site.rows)
        digest.update(f"{site.name} {shape};".encode())
    return digest.hexdigest()


def build_slots(
    network: nn.Module, experts: Sequence[Expert], layout: NetworkMap
) -> tuple[dict[str, MatrixSlot], dict[str, tuple[str, ...]]]:
    """Matrices that an expert has, in execution order, and the experts' matrices without a place.

    Raises:
        InjectionError: an expert was made for another network, or DoRA lacks the base's weights.
    """
    modules = {site.name: base_layer(network.get_submodule(site.path)) for site in layout.sites}
    shapes = {site.name: _delta_shape(modules[site.name], site.rows) for site in layout.sites}
    owned = [_widened(expert.name, _placed(expert, layout), layout, modules) for expert in experts]
    unmatched = {}
    for expert, own in zip(experts, owned, strict=True):
        check_fit(expert, own, shapes, layout, type(network).__name__)
        unmatched[expert.name] = tuple(name for name in own if name not in shapes)
    slots: dict[str, MatrixSlot] = {}
    for site in layout.sites:
        module = modules[site.name]
        factors = {
            i: _exact(own[site.name], module, site.rows, site.name, experts[i].name)
            for i, own in enumerate(owned)
            if site.name in own
        }
        if factors:
            slots[site.name] = MatrixSlot(
                site.name, module, site.stream, factors, site.rows, site.source, site.leads
            )
    if not slots:
        names = ", ".join(repr(expert.name) for expert in experts)
        known = ", ".join(sorted({part for expert in experts for part in expert.factors})) or "nothing"
        raise InjectionError(
            f"None of the experts {names} has matrices for the {layout.part}; they have some for: {known}."
        )
    return slots, unmatched


def _delta_shape(module: nn.Module, rows: slice | None) -> tuple[int, int]:
    """(out, in) of a delta of a matrix; a kernel counts as input."""
    out, fan_in = site_shape(module, rows)
    return out, fan_in * math.prod(kernel_size(module) or (1,))


def _placed(expert: Expert, layout: NetworkMap) -> dict[str, LoraFactors]:
    """Factors by the matrix names of this network: names that depend on it are read again."""
    provisional = expert.provisional.get(layout.part, {})
    usual, here = layout.architecture.read, layout.architecture.reader(layout.sites)
    placed: dict[str, LoraFactors] = {}
    for name, factors in expert.factors.get(layout.part, {}).items():
        flat = provisional.get(name)
        if flat is not None:
            meant = [place.matrix for place in usual(flat)].index(name)
            placed[here(flat)[meant].matrix] = factors
        else:
            placed[name] = factors
    return placed


def _widened(
    expert: str, own: dict[str, LoraFactors], layout: NetworkMap, modules: Mapping[str, nn.Module]
) -> dict[str, LoraFactors]:
    """Factors for inputs that only this variant of the network has are zero, as web UIs have it."""
    for site in layout.sites:
        factors = own.get(site.name) if site.widens else None
        if factors is None:
            continue
        module = modules[site.name]
        out, inputs = site_shape(module, site.rows)
        kernel = math.prod(kernel_size(module) or (1,))
        theirs, rest = divmod(factors.matrices[0].shape[1], kernel)
        if rest or factors.up.shape[0] != out or theirs >= inputs:
            continue
        own[site.name] = _exact(factors, module, site.rows, site.name, expert, theirs).widened(inputs, kernel)
        logger.warning(
            "Expert %r knows %d of the %d input channels of %r in this network: it leaves the others as they "
            "are.",
            expert,
            theirs,
            inputs,
            site.name,
        )
    return own


def _exact(
    factors: LoraFactors,
    module: nn.Module,
    rows: slice | None,
    matrix: str,
    expert: str,
    inputs: int | None = None,
) -> LoraFactors:
    """Factors that need no base weight any more; those of DoRA are computed from it.

    Args:
        factors: of an expert.
        module, rows: the matrix.
        matrix, expert: their names, for errors.
        inputs: how many of the matrix' inputs the factors know; None for all.
    """
    if factors.magnitude is None:
        return factors
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta or not weight.is_floating_point():
        raise InjectionError(
            f"Expert {expert!r} is a DoRA and {matrix!r} of the network has no plain weights in memory "
            "(quantised or offloaded): what a DoRA adds is computed from them. Load the expert first, then "
            "offload; a quantised base cannot take it."
        )
    weight = weight[slice(None) if rows is None else rows, :inputs]
    if factors.magnitude.per_input and factors.magnitude.values.numel() != weight.shape[1]:
        raise InjectionError(
            f"Expert {expert!r} does not fit {matrix!r}: it has DoRA magnitudes for "
            f"{factors.magnitude.values.numel()} inputs, the matrix has {weight.shape[1]}."
        )
    return factors.against(weight)
