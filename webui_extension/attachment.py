"""`Attachment`: experts on the networks of the host's model, for the time of one generation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mole_diffusion import (
    Expert,
    GateMismatchError,
    Mixture,
    MoLEConfig,
    MoLEError,
    read_gates_header,
)
from mole_diffusion.core.bases import base_of_networks
from mole_diffusion.core.ensemble import Ensemble
from mole_diffusion.core.mixture_set import Choice
from mole_diffusion.core.phrases import unnamed
from mole_diffusion.core.records import Recorder

from .host import bare_weights, facts_of, text_encoders_of, unet_of
from .settings import Settings, SettingsError

if TYPE_CHECKING:
    from pathlib import Path

    from torch.utils.hooks import RemovableHandle

    from mole_diffusion import GatesHeader
    from mole_diffusion.core.networks.base import Base

    from .library import Library

UNET = "unet"


@dataclass
class LastRun:
    """What the heat map shows: mean gate weights of one generation.

    Attributes:
        experts: names in the order of the weights.
        weights: part -> gate -> mean weight per expert.
        forwards: how often each part ran.
    """

    experts: tuple[str, ...] = ()
    weights: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    forwards: dict[str, int] = field(default_factory=dict)


class Attachment:
    """Experts, gates and regions on one model.

    Args:
        sd_model: the host's model.
        settings: enabled settings.
        library: where experts and gates are found.
        check_base: whether experts are refused whose file names another prediction type than the model's.

    Attributes:
        ensemble: the experts on the model's networks.
        notes: sentences for the user on what could not be done.
        hashes: expert's name in the settings -> hash of its file.

    Raises:
        SettingsError: a file is not there, or the model is of another kind.
        MoLEError: a file does not fit the model; nothing is attached then.
    """

    def __init__(
        self, sd_model: Any, settings: Settings, library: Library, *, check_base: bool = True
    ) -> None:
        self.settings = settings
        self.notes: list[str] = []
        self._library = library
        self._handles: list[RemovableHandle] = []
        networks: dict[str, nn.Module] = {UNET: unet_of(sd_model), **text_encoders_of(sd_model)}
        self.ensemble = Ensemble(
            networks,
            facts=facts_of(sd_model),
            config=MoLEConfig.uniform(),
            base_weight=bare_weights(sd_model),
            attached=False,
        )
        gates = library.gates_path(settings.gates)
        header = None if gates is None else read_gates_header(gates)
        self._experts = _load(settings, library, header, base_of_networks(networks))
        self._check_base = check_base
        self.hashes = {name: expert.sha256 for name, expert in self._experts.items()}
        try:
            self._attach(header, gates)
        except BaseException:
            self.detach()
            raise

    @property
    def attached(self) -> bool:
        """Whether hooks are on the networks."""
        return any(mixture.injected for mixture in self.ensemble.mixtures.values())

    @property
    def mixtures(self) -> Mapping[str, Mixture]:
        """Part -> its mixture, as long as it is attached."""
        return self.ensemble.mixtures if self.attached else {}

    def is_on(self, sd_model: Any) -> bool:
        """Whether this model's networks carry the experts; a refiner or a checkpoint may have taken over."""
        try:
            return self.ensemble.networks[UNET] is unet_of(sd_model)
        except SettingsError:
            return False

    def detach(self) -> None:
        """Take everything off; the networks are as before. Calling it twice does no harm."""
        self.ensemble.park()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def unnamed(self, prompt: str) -> dict[str, str]:
        """The active experts that a prompt does not name: name of the file -> the phrase to write for it."""
        active = {name: self._experts[name].triggers for name in self.settings.active}
        return unnamed(prompt, active)

    def last_run(self) -> LastRun:
        """Mean gate weights so far; empty without recording."""
        recorder = self.ensemble.recorder or Recorder()
        means = recorder.weights.means()
        return LastRun(
            tuple(self._experts),
            {
                part: {gate: list(own.values()) for gate, own in means.get(part, {}).items()}
                for part in self.ensemble.mixtures
            },
            {part: recorder.forwards.get(part, 0) for part in self.ensemble.mixtures},
        )

    def _attach(self, header: GatesHeader | None, gates: Path | None) -> None:
        ensemble = self.ensemble
        wanted = {part for expert in self._experts.values() for part in expert.factors}
        for part in sorted(wanted - set(ensemble.networks)):
            self.notes.append(
                f"the {part.replace('_', ' ')} of this model cannot take experts on this web UI"
            )
        names = [expert.name for expert in self._experts.values()]
        ensemble.set_experts(self._experts.values(), unchecked=() if self._check_base else names)
        if UNET not in ensemble.mixtures:
            raise SettingsError("none of the experts changes the UNet")
        if gates is not None and header is not None:
            self._load_gates(gates, header)
        ensemble.activate(Choice(self._names(self.settings.active)))
        if self.settings.record:
            ensemble.record(Recorder())
        ensemble.unpark()
        for part in ensemble.mixtures:
            self._watch(ensemble.networks[part])
        if self._has_regions:
            self._handles.append(_RegionHook(self).register(ensemble.networks[UNET]))

    def _load_gates(self, gates: Path, header: GatesHeader) -> None:
        """Gates of the parts that are here; those of an encoder that cannot take experts are left out."""
        here = [part for part in header.parts if part in self.ensemble.networks]
        try:
            self.ensemble.load_gates(gates, parts=here)
        except GateMismatchError as error:
            error.add_hints(_hints({e.name for e in self._experts.values()}, header))
            raise

    @property
    def _has_regions(self) -> bool:
        return any(expert.region is not None for expert in self.settings.experts if expert.active)

    def needs_all_tokens(self) -> bool:
        """Whether gates or regions tell image tokens apart."""
        return self._has_regions or self.ensemble.mixtures[UNET].config.pooling != "mean"

    def activate_regions(self, size: tuple[int, int]) -> None:
        """Draw the rectangles for a latent of (height, width)."""
        masks = {
            self._experts[expert.name].name: rectangle(expert.region, *size)
            for expert in self.settings.experts
            if expert.active and expert.region is not None
        }
        active = self._names(self.settings.active)
        self.ensemble.activate(Choice(active, regions=masks, latent_size=size))

    def _names(self, chosen: Sequence[str]) -> list[str]:
        """Names that gates know the experts by."""
        return [self._experts[name].name for name in chosen]

    def _watch(self, network: nn.Module) -> None:
        """After an exception inside a network the host calls no script: detach at once."""

        def left(module: nn.Module, args: Any, output: Any) -> None:
            if output is None:
                # This hook stays until `detach`: PyTorch is just going through the network's hooks.
                self.ensemble.park()

        self._handles.append(network.register_forward_hook(left, always_call=True))


class _RegionHook:
    """Draws the rectangles anew when the latent's size changes: hires fix, an inpainted detail.

    Args:
        attachment: whose rectangles.
    """

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self._size: tuple[int, int] | None = None

    def register(self, network: nn.Module) -> RemovableHandle:
        """Run before the mixture's own hook, which already wants the masks."""
        return network.register_forward_pre_hook(self, with_kwargs=True, prepend=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latent = args[0] if args else kwargs.get("x")
        if not isinstance(latent, Tensor) or not self._attachment.attached:
            return
        size = (int(latent.shape[-2]), int(latent.shape[-1]))
        if size != self._size:
            self._attachment.activate_regions(size)
            self._size = size


class Refusal:
    """Makes the next run of a network fail with a message.

    Hosts log what a script raises in its callbacks and go on without it: a picture without the experts, and
    nobody knows. What the network raises they show to the user.

    Args:
        network: the UNet.
        error: what to say.
    """

    attached = True

    def __init__(self, network: nn.Module, error: Exception) -> None:
        self._error = error
        self._handle: RemovableHandle | None = network.register_forward_pre_hook(self._refuse, prepend=True)

    def _refuse(self, module: nn.Module, args: Any) -> None:
        self.detach()
        raise self._error

    def detach(self) -> None:
        """Let the network run."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None


def rectangle(region: tuple[float, float, float, float], height: int, width: int) -> Tensor:
    """(height, width) share of each cell that lies in a rectangle (left, top, width, height in shares)."""
    left, top, across, down = region
    return torch.outer(_covered(top, down, height), _covered(left, across, width))


def _covered(start: float, length: float, cells: int) -> Tensor:
    edges = torch.arange(cells + 1, dtype=torch.float64)
    low, high = edges[:-1].clamp_min(start * cells), edges[1:].clamp_max((start + length) * cells)
    return (high - low).clamp(0.0, 1.0).float()


def _load(
    settings: Settings, library: Library, header: GatesHeader | None, base: Base | None
) -> dict[str, Expert]:
    """Name in the settings -> expert, under the name by which the gates know its file."""
    known: dict[str, str] = {}
    if header is not None:
        known = {e["sha256"]: e["name"] for part in header.parts.values() for e in part["experts"]}
    experts = {}
    for chosen in settings.experts:
        expert = library.load(chosen.name, base)
        name = known.get(expert.sha256, expert.name)
        experts[chosen.name] = dataclasses.replace(expert, name=name, scale=chosen.scale)
    return experts


def _hints(chosen: set[str], header: GatesHeader) -> list[str]:
    """What to choose where gates belong to other experts."""
    trained = {name for part in header.parts for name in header.expert_names(part)}
    return [f"choose {name!r} too (untick it to leave it out)" for name in sorted(trained - chosen)] + [
        f"take {name!r} away: the gates were not trained for it" for name in sorted(chosen - trained)
    ]


__all__ = ["UNET", "Attachment", "LastRun", "MoLEError", "Refusal", "rectangle"]
