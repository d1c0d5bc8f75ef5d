"""Applying experts and gates to a MODEL and a CLIP."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from mole_diffusion.core.config import MoLEConfig
from mole_diffusion.core.ensemble import Ensemble
from mole_diffusion.core.errors import InjectionError, NoExpertsError
from mole_diffusion.core.experts import Expert
from mole_diffusion.core.mixture_set import Choice

from .attention import let_attention_be_read
from .auto import ClipReader, is_read
from .binding import (
    KEY,
    Applied,
    Binding,
    LastRun,
    bare_weights,
    facts_of,
    networks_of,
    text_encoders_of,
)
from .experts import ExpertSet, GatesFile
from .memory import count
from .texts import PromptCheck, TextListener

logger = logging.getLogger(__name__)

#: What experts without gates are mixed by.
AUTO, EQUAL = WITHOUT_GATES = ("auto", "equal shares")


def _nobody(text: str) -> None:
    """Nobody is told."""


def apply_experts(
    model: Any,
    clip: Any,
    experts: ExpertSet,
    gates: GatesFile | None,
    without: str = EQUAL,
    tell: Callable[[str], None] = _nobody,
) -> tuple[Any, Any]:
    """Clones of `model` and `clip` that mix the experts while they are loaded; the originals stay as is.

    Args:
        model: ComfyUI's ModelPatcher of a UNet.
        clip: ComfyUI's CLIP.
        experts: at least one.
        gates: those that were trained for the experts, or shared ones, or None.
        without: what mixes the experts without gates: "auto" lets words and places find their experts by the
            prompt; "equal shares" gives each 1/N.
        tell: called before a run with the experts that no prompt of it names, see `PromptCheck`.
    Raises:
        NoExpertsError: there are no experts.
        InjectionError: MODEL or CLIP have experts already.
        ExpertLoadError: an expert belongs to a base of another prediction type.
        InjectionError: an expert does not fit these networks.
        GateMismatchError: the gates were trained for other experts or another network.
    """
    if not experts.experts:
        raise NoExpertsError("There are no experts: connect at least one Load Expert.")
    _check_bare(model, clip)
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
    _take_gates(ensemble, gates)
    choice = _choice(new_clip, ensemble, experts, gates, without)
    ensemble.activate(choice)
    ensemble.record(LastRun())
    check = PromptCheck(clip, _active(experts), tell)
    reader = choice.texts
    listeners: list[TextListener] = [reader, check] if isinstance(reader, ClipReader) else [check]
    on_model = Binding(ensemble, list(networks[0]))
    on_model.install(new_model)
    if choice.auto is not None:
        let_attention_be_read(new_model)
    on_model.check_prompts(new_model, check)
    Binding(ensemble, list(networks[1]), listeners).install(new_clip.patcher)
    for patcher, own in zip((new_model, new_clip.patcher), networks, strict=True):
        patcher.set_attachments(KEY, Applied(experts, ensemble))
        count(patcher, [ensemble.mixtures[part] for part in own if part in ensemble.mixtures])
    return new_model, new_clip


def _check_bare(model: Any, clip: Any) -> None:
    """Refuse a MODEL or CLIP that has experts already."""
    for patcher, what in ((model, "MODEL"), (clip.patcher, "CLIP")):
        if isinstance(before := patcher.get_attachment(KEY), Applied):
            raise InjectionError(
                f"This {what} has the experts {', '.join(before.experts.names)} already, from a MoLE Apply "
                "before this one. Gates share a picture among all experts they know: chain all Load Expert "
                "nodes, and connect the last of them to one MoLE Apply."
            )


def _take_gates(ensemble: Ensemble, gates: GatesFile | None) -> None:
    if gates is not None and gates.shared is None:
        ensemble.load_gates(gates.path)
    elif gates is not None and gates.shared is not None:
        ensemble.take_shared(gates.shared)
    for mixture in ensemble.mixtures.values():
        mixture.gates.requires_grad_(False)


def _choice(
    clip: Any, ensemble: Ensemble, experts: ExpertSet, gates: GatesFile | None, without: str
) -> Choice:
    """Which experts count, and what of the prompts is read for that; see `apply_experts`."""
    seeks = without == AUTO if gates is None else gates.shared is not None
    auto = _reader(clip, ensemble, experts) if seeks else None
    choice = Choice(experts.active, experts.scales, experts.regions or None, auto=auto)
    return ensemble.balanced(choice, lambda: _clip_reader(clip, experts))


def _reader(clip: Any, ensemble: Ensemble, experts: ExpertSet) -> ClipReader | None:
    """What reads the prompts; None where nothing can be told by them."""
    if not is_read(ensemble.mixtures.values()):
        logger.warning("the attention of this MODEL is not read here: without gates every expert counts 1/N")
        return None
    reader = _clip_reader(clip, experts)
    reader.shared = ensemble.shared
    return reader


def _clip_reader(clip: Any, experts: ExpertSet) -> ClipReader:
    return ClipReader(clip, _active(experts), text_encoders_of(clip.patcher.model), experts.names)


def _active(experts: ExpertSet) -> list[Expert]:
    return [one for one in experts.experts if experts.active is None or one.name in experts.active]


def applied_to(model: Any) -> Applied:
    """What Apply MoLE did to this MODEL.

    Raises:
        NoExpertsError: nothing.
    """
    applied = model.get_attachment(KEY)
    if not isinstance(applied, Applied):
        raise NoExpertsError("This MODEL has no experts: connect the MODEL that comes out of Apply MoLE.")
    return applied
