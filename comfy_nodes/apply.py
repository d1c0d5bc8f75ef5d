"""Applying experts and gates to a MODEL and a CLIP."""

from __future__ import annotations

from typing import Any

from mole_diffusion.core.config import MoLEConfig
from mole_diffusion.core.ensemble import Ensemble
from mole_diffusion.core.errors import InjectionError, NoExpertsError
from mole_diffusion.core.mixture_set import Choice

from .binding import KEY, Applied, Binding, LastRun, bare_weights, facts_of, networks_of
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
        InjectionError: MODEL or CLIP have experts already.
        ExpertLoadError: an expert belongs to a base of another prediction type.
        InjectionError: an expert does not fit these networks.
        GateMismatchError: the gates were trained for other experts or another network.
    """
    if not experts.experts:
        raise NoExpertsError("There are no experts: connect at least one Load Expert.")
    for patcher, what in ((model, "MODEL"), (clip.patcher, "CLIP")):
        if isinstance(before := patcher.get_attachment(KEY), Applied):
            raise InjectionError(
                f"This {what} has the experts {', '.join(before.experts.names)} already, from a MoLE Apply "
                "before this one. Gates share a picture among all experts they know: chain all Load Expert "
                "nodes, and connect the last of them to one MoLE Apply."
            )
    new_model, new_clip = model.clone(), clip.clone()
    networks = [networks_of(patcher.model) for patcher in (new_model, new_clip.patcher)]
    ensemble = Ensemble(
        {**networks[0], **networks[1]},
        facts=facts_of(model),
        config=MoLEConfig.uniform(),
        base_weight=bare_weights(model, clip.patcher),
        attached=False,
    )
    ensemble.set_experts(experts.experts, unchecked=experts.unchecked)
    if not ensemble.mixtures:
        raise NoExpertsError(f"None of the experts {', '.join(experts.names)} changes this MODEL or CLIP.")
    if gates is not None:
        ensemble.load_gates(gates.path)
    for mixture in ensemble.mixtures.values():
        mixture.gates.requires_grad_(False)
    ensemble.activate(Choice(experts.active, experts.scales, experts.regions or None))
    ensemble.record(LastRun())
    for patcher, own in zip((new_model, new_clip.patcher), networks, strict=True):
        Binding(ensemble, list(own)).install(patcher)
    for patcher in (new_model, new_clip.patcher):
        patcher.set_attachments(KEY, Applied(experts, ensemble))
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
