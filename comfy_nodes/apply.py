"""Applying experts and gates to a MODEL and a CLIP."""

from __future__ import annotations

from typing import Any

import comfy.model_management

from mole_diffusion.core.checkpoint import load_gates
from mole_diffusion.core.config import MoLEConfig
from mole_diffusion.core.errors import GateMismatchError, NoExpertsError

from .binding import KEY, Applied, Binding
from .experts import ExpertSet, GatesFile


def apply_experts(model: Any, clip: Any, experts: ExpertSet, gates: GatesFile | None) -> tuple[Any, Any]:
    """Clones of `model` and `clip` that mix the experts while they are loaded; the originals stay as is.

    Args:
        model: ComfyUI's ModelPatcher of a UNet.
        clip: ComfyUI's CLIP.
        experts: at least one.
        gates: None weighs all experts alike.
    Raises:
        NoExpertsError: there are no experts.
        InjectionError: an expert does not fit these networks.
        GateMismatchError: the gates were trained for other experts or another network.
    """
    if not experts.experts:
        raise NoExpertsError("There are no experts: connect at least one Load Expert.")
    config = MoLEConfig.uniform()
    if gates is not None:
        config = gates.header.config(next(iter(gates.header.parts)))
    if any(
        f.magnitude is not None for e in experts.experts for own in e.factors.values() for f in own.values()
    ):
        # What a DoRA adds is computed from the network's own weights, without anybody's patches.
        comfy.model_management.unload_all_models()
    bindings = (Binding(config, experts), Binding(config, experts))
    new_model, new_clip = model.clone(), clip.clone()
    bindings[0].build(new_model.model)
    bindings[1].build(new_clip.patcher.model)
    applied = Applied(experts, bindings)
    if not applied.mixtures:
        raise NoExpertsError(f"None of the experts {', '.join(experts.names)} changes this MODEL or CLIP.")
    if gates is not None:
        _load(gates, applied)
    bindings[0].install(new_model)
    bindings[1].install(new_clip.patcher)
    new_model.set_attachments(KEY, applied)
    return new_model, new_clip


def applied_to(model: Any) -> Applied:
    """What Apply MoLE did to this MODEL.

    Raises:
        NoExpertsError: nothing.
    """
    applied = model.get_attachment(KEY)
    if not isinstance(applied, Applied):
        raise NoExpertsError("This MODEL has no experts: connect the MODEL that comes out of Apply MoLE.")
    return applied


def _load(gates: GatesFile, applied: Applied) -> None:
    try:
        load_gates(gates.path, applied.mixtures)
    except GateMismatchError as error:
        raise GateMismatchError(f"The gates in {gates.path.name!r} do not fit:", error.differences) from None
