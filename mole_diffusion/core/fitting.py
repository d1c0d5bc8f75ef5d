"""Experts' factors on the matrices of one network, and what tells the network from others."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from .bases import check_fit
from .dora import BaseWeight, Dora, own_weight
from .errors import InjectionError
from .experts import Expert
from .factors import LoraFactors
from .matrices import MatrixSlot, weight_of
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
    network: nn.Module,
    experts: Sequence[Expert],
    layout: NetworkMap,
    base_weight: BaseWeight = own_weight,
) -> tuple[dict[str, MatrixSlot], dict[str, tuple[str, ...]]]:
    """Matrices that an expert has, in execution order, and the experts' matrices without a place.

    Args:
        network: the network.
        experts: in the order of the gates' rows.
        layout: what the network is.
        base_weight: what DoRA is computed from.
    Raises:
        InjectionError: an expert was made for another network, or DoRA lacks the base's weights.
    """
    modules = {site.name: base_layer(network.get_submodule(site.path)) for site in layout.sites}
    shapes = {site.name: _delta_shape(modules[site.name], site.rows) for site in layout.sites}
    placed = [_placed(expert, layout) for expert in experts]
    doras = [_doras(expert.name, own) for expert, own in zip(experts, placed, strict=True)]
    owned = [
        _widened(e.name, own, layout, modules, d) for e, own, d in zip(experts, placed, doras, strict=True)
    ]
    for own, dora in zip(owned, doras, strict=True):
        for site in layout.sites:
            if site.name in dora:
                weight = weight_of(base_weight(modules[site.name]), swapped=site.swapped)
                own[site.name] = dora[site.name].plain(weight, site.rows)
    unmatched = {}
    for expert, own in zip(experts, owned, strict=True):
        check_fit(expert, own, shapes, layout, type(network).__name__)
        unmatched[expert.name] = tuple(name for name in own if name not in shapes)
    slots: dict[str, MatrixSlot] = {}
    for site in layout.sites:
        module = modules[site.name]
        factors = {i: own[site.name] for i, own in enumerate(owned) if site.name in own}
        if factors:
            slots[site.name] = MatrixSlot(
                site.name,
                module,
                site.stream,
                factors,
                site.rows,
                site.swapped,
                site.source,
                folds=site.folds,
                amid=site.amid,
                may_lead=site.leads,
            )
            slots[site.name].doras = {i: d[site.name] for i, d in enumerate(doras) if site.name in d}
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


def _doras(expert: str, own: Mapping[str, LoraFactors]) -> dict[str, Dora]:
    """The matrices of an expert that are computed from the base's weights."""
    return {
        name: Dora(factors, name, expert) for name, factors in own.items() if factors.magnitude is not None
    }


def _widened(
    expert: str,
    own: dict[str, LoraFactors],
    layout: NetworkMap,
    modules: Mapping[str, nn.Module],
    doras: dict[str, Dora],
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
        if site.name in doras:
            doras[site.name] = replace(doras[site.name], inputs=theirs, widened=(inputs, kernel))
        else:
            own[site.name] = factors.widened(inputs, kernel)
        logger.warning(
            "Expert %r knows %d of the %d input channels of %r in this network: it leaves the others as they "
            "are.",
            expert,
            theirs,
            inputs,
            site.name,
        )
    return own
