"""`MixtureSet`: experts with a mixture on each network they change; `Choice`: which of them count."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor, nn

from .auto import Auto
from .calling import Calling
from .config import MoLEConfig
from .experts import Expert
from .gated_balance import Styled
from .mixture import Mixture
from .routing import Route


@dataclass(frozen=True, eq=False)
class Choice:
    """Which experts count, and how, in the forwards to come; see `Mixture.activate`.

    Attributes:
        active: names of the experts that count; None for all.
        scales: factor per expert, in place of the one it was loaded with.
        regions: (H, W) in 0..1 per expert; they hold in networks that have image tokens.
        latent_size: (height, width) of the latent; None to read it off the network's input.
        weights: fixed weights that replace the gates.
        base_only: no expert counts, and nothing else of them either (their trigger words).
        route: how each matrix weighs the experts by itself, in place of the gates.
        auto: what the prompts say of the experts, in place of the gates.
        styled: where gates mix the experts, keeps styles in balance with the others.
    """

    active: Sequence[str] | None = None
    scales: Mapping[str, float] | None = None
    regions: Mapping[str, Tensor] | None = None
    latent_size: tuple[int, int] | None = None
    weights: Mapping[str, float] | None = None
    base_only: bool = False
    route: Route | None = None
    auto: Auto | None = None
    styled: Styled | None = None

    @property
    def gated(self) -> bool:
        """Whether gates mix the experts."""
        others = self.weights, self.route, self.auto
        return not self.base_only and all(one is None for one in others)

    @property
    def texts(self) -> Auto | None:
        """What wants to know the texts that a host encodes."""
        return self.auto or (self.styled.texts if self.styled is not None else None)

    def apply(self, mixtures: Iterable[Mixture]) -> None:
        """Set mixtures to this.

        Raises:
            MoLEError: see `Mixture.activate`.
        """
        for mixture in mixtures:
            if self.base_only:
                mixture.disable()
                continue
            mixture.enable()
            mixture.activate(
                self.active,
                expert_scales=self.scales,
                region_masks=self.regions if mixture.in_picture else None,
                latent_size=self.latent_size if mixture.in_picture else None,
                weights=self.weights,
                route=self.route,
                auto=self.auto,
                styled=self.styled,
            )


class Companion(Protocol):
    """What experts bring along beside their matrices: trigger words in a tokenizer."""

    def attach(self) -> None:
        """Let it work."""

    def detach(self) -> None:
        """Take it away without a trace."""

    def show(self, shown: bool) -> None:
        """Let it be known, or for a while not."""


#: Makes the companions of some experts; called when those of earlier experts are off.
Companions = Callable[[Sequence[Expert]], Iterable[Companion]]


@dataclass(eq=False)
class MixtureSet:
    """Experts, the form of their gates, and the mixture on each network that an expert changes.

    Its hooks may be on the networks or not: `Ensemble.take` hands one over, and one may stand in for another.

    Attributes:
        experts: by name, in the order of the gates' rows.
        config: the form of fresh gates.
        configs: part -> form of its gates, where a gates file says another one.
        networks: the networks, by part.
        mixtures: by part.
        companions: what the experts bring along.
        choice: what counts in the forwards to come.
        said: names of experts that change the whole picture, as the gates' training was told.
    """

    experts: dict[str, Expert] = field(default_factory=dict)
    config: MoLEConfig = field(default_factory=MoLEConfig)
    configs: dict[str, MoLEConfig] = field(default_factory=dict)
    networks: dict[str, nn.Module] = field(default_factory=dict)
    mixtures: dict[str, Mixture] = field(default_factory=dict)
    companions: list[Companion] = field(default_factory=list)
    choice: Choice = field(default_factory=Choice)
    said: frozenset[str] = frozenset()

    @property
    def styles(self) -> list[str]:
        """The experts that change the whole picture: by their files, their phrases, or as was said."""
        calling = Calling(styles=tuple(self.said))
        return [name for name, expert in self.experts.items() if calling.is_style(expert)]

    @property
    def attached(self) -> list[str]:
        """The parts whose hooks are on."""
        return [part for part, mixture in self.mixtures.items() if mixture.injected]

    def activate(self, choice: Choice) -> None:
        """Let this count in the forwards to come; what fails leaves what counted before.

        Raises:
            MoLEError: see `Mixture.activate`.
        """
        try:
            if choice.base_only:
                # A misspelt name must not pass only because nothing is drawn with it.
                replace(choice, base_only=False).apply(self.mixtures.values())
            choice.apply(self.mixtures.values())
        except BaseException:
            self.choice.apply(self.mixtures.values())
            raise
        self.choice = choice
        self.show()

    def show(self) -> None:
        """Let the companions be known, or not, as the choice has it."""
        for companion in self.companions:
            companion.show(not self.choice.base_only)

    def attach(self, parts: Collection[str] | None = None) -> None:
        """Put hooks and companions on, or nothing of them.

        Args:
            parts: the networks; None for all.

        Raises:
            InjectionError: a network carries another mixture.
        """
        try:
            for part, mixture in self.mixtures.items():
                if parts is None or part in parts:
                    mixture.attach()
            for companion in self.companions:
                companion.attach()
        except BaseException:
            self.detach()
            raise
        self.show()

    def detach(self) -> None:
        """Take hooks and companions off; the networks are bitwise as before."""
        for mixture in self.mixtures.values():
            mixture.eject()
        for companion in self.companions:
            companion.detach()
