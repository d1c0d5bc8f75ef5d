"""`Attachment`: experts on the networks of the host's model, for the time of one generation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

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
from mole_diffusion.core.shared_gates import SharedGates, is_shared_gates

from .hooks import UNET, RegionHook, TextHook, rectangle
from .host import bare_weights, facts_of, text_encoders_of, text_processors_of, unet_of
from .reading import Prompt, TextReader
from .settings import AUTO, Settings, SettingsError

if TYPE_CHECKING:
    from pathlib import Path

    from torch.utils.hooks import RemovableHandle

    from mole_diffusion import GatesHeader
    from mole_diffusion.core.networks.base import Base

    from .library import Library


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
        fallen_back: why experts without gates have equal shares though the prompt was to share out words and
            places; None where nothing speaks against it.
        halfway: whether that turned out while the picture was drawn.
        on_fall_back: called when that turns out while a picture is drawn.

    Raises:
        SettingsError: a file is not there, or the model is of another kind.
        MoLEError: a file does not fit the model; nothing is attached then.
    """

    def __init__(
        self, sd_model: Any, settings: Settings, library: Library, *, check_base: bool = True
    ) -> None:
        self.settings = settings
        self.notes: list[str] = []
        self.fallen_back: str | None = None
        self.halfway = False
        self.on_fall_back: Callable[[], None] = _nobody
        self._library = library
        self._sd_model = sd_model
        self._reader: TextReader | None = None
        self._latent: tuple[int, int] | None = None
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
        header = None if gates is None or is_shared_gates(gates) else read_gates_header(gates)
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
        if self._reader is not None:
            self._reader.detach()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def seeks(self) -> bool:
        """Whether the experts are to find their words and places by the prompt."""
        auto = self.settings.gates == AUTO or self.ensemble.shared is not None
        return auto and len(self.settings.active) > 1

    def begin_batch(self, passes: Sequence[Sequence[Prompt]], disturbances: Sequence[str] = ()) -> bool:
        """A batch begins, whose prompts are not encoded yet.

        Args:
            passes: its prompts, for each pass.
            disturbances: what the host does to image tokens.
        Returns:
            Whether texts that the host has encoded before are not what they would be now.
        """
        if not self.seeks:
            return False
        reader, before = self._reader, self._mixed_by()
        self.halfway = False
        if disturbances:
            self.fallen_back = f"{' and '.join(disturbances)} of the web UI is on"
        elif reader is None:
            self.fallen_back = "this web UI does not say how it reads prompts"
        else:
            self.fallen_back = reader.read(passes)
        anew = bool(before != self._mixed_by())
        if anew and reader is not None:
            reader.forget()
        # Also for the same texts: what was seen of the last picture does not count for the next one.
        self.ensemble.activate(self._choice())
        return anew

    def draw_on(self) -> None:
        """The next steps go on with the same picture, in another size."""
        if self._reader is not None:
            self._reader.continues = True

    def counting_everywhere(self) -> list[str]:
        """Files of experts that no prompt names and whose own words nobody knows."""
        if self._auto is None:
            return []
        found = self._auto.counting_everywhere()
        return [name for name, expert in self._experts.items() if expert.name in found]

    def unrefined(self) -> list[str]:
        """Files of the experts of the whole picture for which shared gates refine nothing in it."""
        found = () if self._auto is None else self._auto.unrefined
        return [name for name, expert in self._experts.items() if expert.name in found]

    @property
    def _auto(self) -> TextReader | None:
        """What the experts find their words and places by; None where something else mixes them."""
        return self._reader if self.seeks and self.fallen_back is None else None

    def _mixed_by(self) -> Any:
        """What decides how the host's text encoders read a text."""
        return None if self._auto is None else dict(self._auto.everywhere)

    def _choice(self) -> Choice:
        """What counts in the forwards to come; regions once the latent's size is known."""
        choice = Choice(self._names(self.settings.active), auto=self._auto)
        if self._has_regions and self._latent is not None:
            masks = {
                self._experts[expert.name].name: rectangle(expert.region, *self._latent)
                for expert in self.settings.experts
                if expert.active and expert.region is not None
            }
            choice = dataclasses.replace(choice, regions=masks, latent_size=self._latent)
        return self.ensemble.balanced(choice, lambda: self._reader)

    def fall_back(self, why: str) -> None:
        """Give the experts equal shares from now on."""
        self.fallen_back, self.halfway = why, True
        self.ensemble.activate(self._choice())
        self.on_fall_back()

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
        if header is not None and gates is not None:
            self._load_gates(gates, header)
        elif gates is not None:
            ensemble.take_shared(SharedGates.load(gates))
        self._listen()
        ensemble.activate(self._choice())
        if self.settings.record:
            ensemble.record(Recorder())
        ensemble.unpark()
        for part in ensemble.mixtures:
            self._watch(ensemble.networks[part])
        if self._has_regions:
            self._handles.append(RegionHook(self).register(ensemble.networks[UNET]))
        if self._reader is not None and self.seeks:
            self._handles.append(TextHook(self, self._reader).register(ensemble.networks[UNET]))

    def _listen(self) -> None:
        """Have the host's texts read, if experts are to find their places by them, or gates keep styles."""
        processors = text_processors_of(self._sd_model)
        wanted = self.seeks or self._choice().styled is not None
        if wanted and processors and hasattr(self._sd_model, "get_learned_conditioning"):
            active = self._names(self.settings.active)
            self._reader = TextReader(processors, self._experts.values(), active)
            self._reader.shared = self.ensemble.shared
            self._reader.attach(self._sd_model)

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
        """Whether gates or regions tell image tokens apart; experts without gates do without."""
        return self._has_regions or self.ensemble.mixtures[UNET].config.pooling != "mean"

    def activate_regions(self, size: tuple[int, int]) -> None:
        """Draw the rectangles for a latent of (height, width)."""
        self._latent = size
        self.ensemble.activate(self._choice())

    def _names(self, chosen: Sequence[str]) -> list[str]:
        """Names that gates know the experts by."""
        return [self._experts[name].name for name in chosen]

    def _watch(self, network: nn.Module) -> None:
        """After an exception inside a network the host calls no script: detach at once."""

        def left(module: nn.Module, args: Any, output: Any) -> None:
            if output is None:
                # This hook stays until `detach`: PyTorch is just going through the network's hooks.
                self.ensemble.park()
                if self._reader is not None:
                    self._reader.detach()

        self._handles.append(network.register_forward_hook(left, always_call=True))


def _nobody() -> None:
    """Nobody is told."""


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


__all__ = ["UNET", "Attachment", "LastRun", "MoLEError"]
