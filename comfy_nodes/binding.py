"""Mixtures on ComfyUI's models: who attached the hooks, and when they come off again.

ComfyUI shares one network among all clones of a model and tells a clone to inject what it adds when that
clone is loaded, and to eject it when another takes its place. Two traps: `clone()` copies the flag that says
the clone has injected, and `__del__` ejects, so that collecting an unused clone would take the hooks off that
another clone put on. Hence only the clone that attached the hooks may remove them.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.patcher_extension import CallbacksMP, PatcherInjection
from torch import Tensor, nn

from mole_diffusion.core.config import MoLEConfig
from mole_diffusion.core.errors import InjectionError
from mole_diffusion.core.experts import Expert
from mole_diffusion.core.mixture import Mixture
from mole_diffusion.core.networks import map_network
from mole_diffusion.core.networks.clip import TEXT_ENCODER, TEXT_ENCODER_2
from mole_diffusion.core.networks.unet import UNET

from .experts import ExpertSet

#: Name of everything that these nodes leave on a model.
KEY = "mole"
#: ComfyUI's name of a text encoder -> ours.
_TEXT_ENCODERS = {"clip_l": TEXT_ENCODER, "clip_h": TEXT_ENCODER, "clip_g": TEXT_ENCODER_2}

#: network -> the binding whose hooks are on it.
_attached: weakref.WeakKeyDictionary[nn.Module, Binding] = weakref.WeakKeyDictionary()


def networks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The networks inside what a ModelPatcher holds that experts can change, by part.

    Raises:
        InjectionError: it holds none.
    """
    found: dict[str, nn.Module] = {}
    if isinstance(network := getattr(model, "diffusion_model", None), nn.Module):
        found[UNET] = network
    for name, part in _TEXT_ENCODERS.items():
        if isinstance(encoder := getattr(model, name, None), nn.Module):
            found[part] = encoder.get_submodule("transformer")
    if not found:
        raise InjectionError(
            f"{type(model).__name__} is neither a Stable Diffusion UNet nor a CLIP text encoder; experts can "
            "be attached to the models of Stable Diffusion 1.x, 2.x and XL."
        )
    return found


class Usage:
    """Mean gate weights of the forwards since the last reset: part -> gate -> (N,) sums and their number."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, tuple[Tensor, int]]] = {}

    def reset(self) -> None:
        """Forget everything."""
        self._sums.clear()

    def add(self, mixture: Mixture) -> None:
        """Count the gate weights of a mixture's last forward."""
        gates = self._sums.setdefault(mixture.part, {})
        for label, weights in mixture.live_weights().items():
            total, count = gates.get(label, (0.0, 0))
            gates[label] = total + weights.detach().float().sum(0).cpu(), count + len(weights)

    def means(self) -> dict[str, dict[str, list[float]]]:
        """part -> gate -> mean weight of each expert; gates in the order in which they ran."""
        return {
            part: {label: (total / count).tolist() for label, (total, count) in gates.items()}
            for part, gates in self._sums.items()
            if gates
        }


@dataclass(eq=False)
class Binding:
    """The mixtures of one application of experts to one MODEL or CLIP, shared by all clones made from it.

    Attributes:
        config: form of the gates.
        experts: experts, and which of them count.
        mixtures: part -> mixture, on the networks as they were when last attached.
        usage: gate weights of the last run.
    """

    config: MoLEConfig
    experts: ExpertSet
    mixtures: dict[str, Mixture] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)
    _owner: int | None = None
    _modules: dict[str, list[int]] = field(default_factory=dict)
    _counters: list[Any] = field(default_factory=list)

    def build(self, model: nn.Module) -> None:
        """Make the mixtures for the networks in `model`, without attaching them.

        Raises:
            InjectionError: an expert does not fit.
            MoLEError: a strength, region or choice of experts makes no sense.
        """
        for part, network in networks_of(model).items():
            modules = [id(module) for module in network.modules()]
            if modules == self._modules.get(part) or not _has(self.experts.experts, part):
                continue
            before = self.mixtures.get(part)
            with torch.inference_mode(False):
                mixture = Mixture(
                    network, self.experts.experts, self.config, map_network(network, part), None
                )
                if before is not None:
                    mixture.gates.load_state_dict(before.gates.state_dict())
                mixture.gates.requires_grad_(False)
                self._activate(mixture)
            self.mixtures[part], self._modules[part] = mixture, modules

    def _activate(self, mixture: Mixture) -> None:
        chosen = self.experts
        mixture.activate(
            chosen.active,
            expert_scales=chosen.scales,
            region_masks=(chosen.regions or None) if mixture.part == UNET else None,
        )

    def inject(self, patcher: Any) -> None:
        """Attach the hooks for a clone; called by ComfyUI when the clone is loaded."""
        self.build(patcher.model)
        for mixture in self.mixtures.values():
            if (other := _attached.get(mixture.network)) is not None:
                other.detach()
            with torch.inference_mode(False):
                mixture.to(patcher.load_device)
            mixture.attach()
            count = _Counter(self.usage, mixture)
            self._counters.append(mixture.network.register_forward_hook(count))
            _attached[mixture.network] = self
        self._owner = id(patcher)

    def eject(self, patcher: Any) -> None:
        """Remove the hooks if this clone attached them; called by ComfyUI when the clone goes."""
        if self._owner == id(patcher):
            self.detach()

    def detach(self) -> None:
        """Remove the hooks, whoever attached them."""
        self._owner = None
        for counter in self._counters:
            counter.remove()
        self._counters.clear()
        for mixture in self.mixtures.values():
            mixture.eject()
            _attached.pop(mixture.network, None)

    def release(self, patcher: Any) -> None:
        """Let go of memory on the device: the model goes back to where it waits."""
        if sys.is_finalizing():  # ComfyUI's models go last, when nothing can be imported any more
            return
        for mixture in self.mixtures.values():
            if not mixture.injected:
                with torch.inference_mode(False):
                    mixture.to(patcher.offload_device)
                mixture.release()

    def install(self, patcher: Any) -> None:
        """Make a clone of a model carry this binding, in place of one it may carry from its parent."""
        # The parent may have its hooks on right now; this clone has none.
        patcher.is_injected = False
        patcher.set_injections(KEY, [PatcherInjection(self.inject, self.eject)])
        for event, callback in (
            (CallbacksMP.ON_CLONE, _forget_injection),
            (CallbacksMP.ON_PRE_RUN, lambda _: self.usage.reset()),
            (CallbacksMP.ON_DETACH, lambda patcher, _: self.release(patcher)),
        ):
            patcher.remove_callbacks_with_key(event, KEY)
            patcher.add_callback_with_key(event, KEY, callback)


class _Counter:
    """Forward hook of a network that counts its gate weights."""

    def __init__(self, usage: Usage, mixture: Mixture) -> None:
        self._usage = usage
        self._mixture = mixture

    def __call__(self, *_: object) -> None:
        self._usage.add(self._mixture)


def _forget_injection(parent: Any, clone: Any) -> None:
    """A new clone has injected nothing yet, whatever it copied from its parent."""
    clone.is_injected = False


def _has(experts: Sequence[Expert], part: str) -> bool:
    return any(expert.factors.get(part) for expert in experts)


@dataclass(frozen=True)
class Applied:
    """What Apply MoLE leaves on a MODEL for the nodes behind it.

    Attributes:
        experts: the experts, and which of them count.
        bindings: those of the MODEL and of the CLIP.
    """

    experts: ExpertSet
    bindings: tuple[Binding, ...]

    @property
    def mixtures(self) -> dict[str, Mixture]:
        """part -> mixture."""
        return {part: mixture for binding in self.bindings for part, mixture in binding.mixtures.items()}

    def means(self) -> Mapping[str, Mapping[str, list[float]]]:
        """Mean gate weights of the last run: part -> gate -> weight of each expert."""
        return {part: gates for binding in self.bindings for part, gates in binding.usage.means().items()}
