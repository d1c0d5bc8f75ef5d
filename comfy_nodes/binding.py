"""Mixtures on ComfyUI's models: who attached the hooks, and when they come off again.

ComfyUI shares one network among all clones of a model and tells a clone to inject what it adds when that
clone is loaded, and to eject it when another takes its place. Two traps: `clone()` copies the flag that says
the clone has injected, and `__del__` ejects, so that collecting an unused clone would take the hooks off that
another clone put on. Hence only the clone that attached the hooks may remove them.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.model_sampling
from comfy.patcher_extension import CallbacksMP, PatcherInjection, WrappersMP
from torch import nn

from mole_diffusion.core.dora import BaseWeight, own_weight
from mole_diffusion.core.ensemble import PREDICTION_TYPE, Ensemble
from mole_diffusion.core.errors import InjectionError
from mole_diffusion.core.mixture import Mixture, mixture_on
from mole_diffusion.core.networks import find_network, known_families
from mole_diffusion.core.networks.clip import TEXT_ENCODER, TEXT_ENCODER_2
from mole_diffusion.core.networks.transformers import TRANSFORMER
from mole_diffusion.core.networks.unet import UNET
from mole_diffusion.core.records import MeanWeights, Recorder

from .experts import ExpertSet
from .texts import PromptCheck, TextListener, listen, stop_listening

#: Name of everything that these nodes leave on a model.
KEY = "mole"
#: ComfyUI's name of a text encoder -> ours.
_TEXT_ENCODERS = {"clip_l": TEXT_ENCODER, "clip_h": TEXT_ENCODER, "clip_g": TEXT_ENCODER_2}
# Denoiser -> what gates files call it.
_slots: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
#: Network -> the mixture that ran on it last, for which things may be ready on the device.
_ready: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Mixture]] = weakref.WeakKeyDictionary()


def networks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The networks inside what a ModelPatcher holds that experts can change, by part.

    None of a CLIP whose text encoders are language models alone, as those of most transformers.

    Raises:
        InjectionError: it is neither a MODEL nor a CLIP.
    """
    found: dict[str, nn.Module] = {}
    if isinstance(network := getattr(model, "diffusion_model", None), nn.Module):
        found[slot_of(network)] = network
    for name, part in _TEXT_ENCODERS.items():
        if isinstance(encoder := getattr(model, name, None), nn.Module):
            inner: Any = encoder.transformer
            found[part] = inner
    if not found and not hasattr(model, "encode_token_weights"):
        raise InjectionError(
            f"{type(model).__name__} is neither a denoiser nor a CLIP text encoder; experts can be attached "
            f"to the models of {', '.join(known_families())}."
        )
    return found


def text_encoders_of(clip_model: nn.Module) -> dict[str, str]:
    """Part -> ComfyUI's name of a text encoder, of those that experts can change."""
    # Those of Stable Diffusion 3 may be missing.
    found = {part: name for name, part in _TEXT_ENCODERS.items() if hasattr(clip_model, name)}
    return {part: name for part, name in found.items() if getattr(clip_model, name) is not None}


def slot_of(network: nn.Module) -> str:
    """What gates files call a denoiser: a UNet or a transformer."""
    if network not in _slots:
        layout = find_network(network)
        _slots[network] = UNET if layout is None else layout.part
    return _slots[network]


def adapts_text(network: nn.Module) -> bool:
    """Whether a denoiser makes the text anew, of words that another tokenizer told it, as Anima does."""
    return hasattr(network, "preprocess_text_embeds")


def facts_of(model: Any) -> dict[str, str]:
    """What experts and gates must agree with: what a MODEL predicts, as it would be sampled now.

    Args:
        model: ComfyUI's ModelPatcher; nodes such as ModelSamplingDiscrete change what it predicts.
    """
    sampling = model.get_model_object("model_sampling")
    # From the special to the general: a V_PREDICTION is an EPS too, and an EDM both.
    for kind, predicted in (
        ((comfy.model_sampling.X0, comfy.model_sampling.EDM), None),
        (comfy.model_sampling.V_PREDICTION, "v_prediction"),
        (comfy.model_sampling.EPS, "epsilon"),
    ):
        if isinstance(sampling, kind):
            return {} if predicted is None else {PREDICTION_TYPE: predicted}
    return {}


def bare_weights(*patchers: Any) -> BaseWeight:
    """The weight of a module without anybody's patches, which ComfyUI makes in place and keeps a copy for.

    Args:
        patchers: of the models; their clones share the copies.
    """
    # Not the patchers themselves: what they carry leads here, and a circle would keep them.
    kept = {
        module: (patcher.backup, f"{name}.weight")
        for patcher in patchers
        for name, module in patcher.model.named_modules()
    }

    def bare(module: nn.Module) -> Any:
        backup, key = kept.get(module, ({}, ""))
        return backup[key].weight if key in backup else own_weight(module)

    return bare


@dataclass(eq=False)
class Binding:
    """An ensemble on the networks of one MODEL or CLIP, shared by all clones made from it.

    Attributes:
        ensemble: the experts on the networks of the MODEL and of the CLIP.
        parts: those of this one.
        listeners: of a CLIP, hear of the texts that it encodes.
    """

    ensemble: Ensemble
    parts: Sequence[str]
    listeners: Sequence[TextListener] = ()
    _owner: int | None = None
    _modules: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._modules = {part: _modules(self.ensemble.networks[part]) for part in self.parts}

    def inject(self, patcher: Any) -> None:
        """Attach the hooks for a clone; called by ComfyUI when the clone is loaded."""
        networks = networks_of(patcher.model)
        for part in self.parts:
            if part in self.ensemble.mixtures:
                self._renew(part, networks[part])
                _take_over(networks[part], self.ensemble.mixtures[part])
                _make_room(networks[part], self.ensemble.mixtures[part])
        self.ensemble.unpark(self.parts)
        for listener in self.listeners:
            listener.attach(patcher.model)
        if self.listeners:
            listen(patcher.model, self.listeners)
        self._owner = id(patcher)

    def _renew(self, part: str, network: nn.Module) -> None:
        """Look modules up again where object patches replaced some."""
        modules = _modules(network)
        if modules != self._modules[part]:
            self.ensemble.networks[part] = network
            self.ensemble.renew(part)
            self._modules[part] = modules

    def eject(self, patcher: Any) -> None:
        """Remove the hooks if this clone attached them; called by ComfyUI when the clone goes."""
        if self._owner == id(patcher):
            self._owner = None
            self.ensemble.park(self.parts)
            if self.listeners:
                stop_listening(patcher.model)
            for listener in self.listeners:
                listener.detach(patcher.model)

    def release(self, patcher: Any, everything: bool) -> None:
        """Let go of memory on the device where the model goes back to where it waits.

        Args:
            patcher: the clone that goes.
            everything: whether the model leaves the device. ComfyUI lets a clone go before every run of a
                sampler, also before its own: what was made ready for it stays then.
        """
        # ComfyUI's models go last, when nothing can be imported any more.
        if not everything or sys.is_finalizing():
            return
        for part, mixture in self.ensemble.mixtures.items():
            if part in self.parts and not mixture.injected:
                mixture.to(patcher.offload_device)
                mixture.release()

    def install(self, patcher: Any) -> None:
        """Make a clone of a model carry this binding, in place of one it may carry from its parent."""
        # The parent may have its hooks on right now; this clone has none.
        patcher.is_injected = False
        patcher.set_injections(KEY, [PatcherInjection(self.inject, self.eject)])
        for event, callback in (
            (CallbacksMP.ON_CLONE, _forget_injection),
            (CallbacksMP.ON_PRE_RUN, lambda _: self._begin_run()),
            (CallbacksMP.ON_DETACH, self.release),
        ):
            patcher.remove_callbacks_with_key(event, KEY)
            patcher.add_callback_with_key(event, KEY, callback)

    def check_prompts(self, patcher: Any, check: PromptCheck) -> None:
        """Let the samplers of a MODEL look at their texts first."""
        patcher.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
        patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, check.begin_sampling)

    def _begin_run(self) -> None:
        if isinstance(recorder := self.ensemble.recorder, LastRun):
            recorder.begin()


class LastRun(Recorder):
    """Gate weights of the last run of a sampler, and of the texts that were encoded for it."""

    _ran = False

    def begin(self) -> None:
        """A sampler begins: forget the pictures of the one before; the texts are its own."""
        self.reset([UNET, TRANSFORMER])
        self._ran = True

    def note(self, mixture: Mixture) -> None:
        """See `Recorder`; the first text after a run begins a new record of texts."""
        if self._ran and not mixture.in_picture:
            self.reset([TEXT_ENCODER, TEXT_ENCODER_2])
            self._ran = False
        super().note(mixture)


def _modules(network: nn.Module) -> list[int]:
    """Tells whether modules were replaced."""
    return [id(module) for module in network.modules()]


def _take_over(network: nn.Module, mixture: Mixture) -> None:
    """Let another application's hooks go, which a clone that ComfyUI still counts as loaded put on."""
    other = mixture_on(network)
    if other is None or other is mixture:
        return
    owner = None if other.owner is None else other.owner()
    if isinstance(owner, Ensemble):
        owner.park([other.part])
    other.eject()


def _make_room(network: nn.Module, mixture: Mixture) -> None:
    """Let go of what was made ready on the device for the experts that were on this network before."""
    before = _ready.get(network)
    other = None if before is None else before()
    if other is not None and other is not mixture:
        other.release()
    _ready[network] = weakref.ref(mixture)


def _forget_injection(parent: Any, clone: Any) -> None:
    """A new clone has injected nothing yet, whatever it copied from its parent."""
    clone.is_injected = False


@dataclass(frozen=True)
class Applied:
    """What Apply MoLE leaves on a MODEL for the nodes behind it.

    Attributes:
        experts: the experts, and which of them count.
        ensemble: the experts on the networks of the MODEL and of the CLIP.
    """

    experts: ExpertSet
    ensemble: Ensemble

    def means(self) -> MeanWeights:
        """Mean gate weights of the last run."""
        return self.ensemble.recorder.weights.means() if self.ensemble.recorder else {}
