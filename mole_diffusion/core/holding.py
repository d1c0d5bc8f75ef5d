"""What every model with experts offers and says, whatever it makes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from .config import MoLEConfig
from .ensemble import Ensemble
from .errors import ExpertLoadError, NoExpertsError, UnknownExpertError
from .experts import Expert
from .mixture import Mixture
from .mixture_set import MixtureSet


class HoldsExperts:
    """The experts of a model and their gates, out of its `ensemble`."""

    @property
    @abstractmethod
    def ensemble(self) -> Ensemble:
        """The experts on the model's networks."""

    @property
    def experts(self) -> Mapping[str, Expert]:
        """The loaded experts by name, in the order in which they were loaded: that of the gates' rows."""
        return MappingProxyType(self.ensemble.experts)

    @property
    def mixtures(self) -> Mapping[str, Mixture]:
        """The mixture of each network that experts change, by the network's name in the model."""
        return MappingProxyType(self.ensemble.mixtures)

    @property
    def mole_config(self) -> MoLEConfig:
        """How gates are built; change it with `configure`."""
        return self.ensemble.config

    def configure(self, config: MoLEConfig) -> None:
        """Give all experts fresh gates of another kind (granularity, pooling, ...); trained ones are lost.

        Raises:
            ConfigError: a network cannot have such gates; a decoder that runs token by token is one.
        """
        self.ensemble.configure(config)

    def eject(self) -> None:
        """Take everything away: the networks are bitwise what they were before the first expert."""
        self.ensemble.eject()

    def detach_experts(self) -> MixtureSet:
        """Take experts, gates and trigger words off, bitwise, and hand them over for `attach_experts`.

        For hosts that serve several users with one base model, one after the other.
        """
        return self.ensemble.take()

    def attach_experts(self, parked: MixtureSet) -> None:
        """Put on what `detach_experts` took off the same networks; gates are as they were.

        Raises:
            InjectionError: the model has experts, or other networks.
        """
        self.ensemble.put(parked)

    def save_gates(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write the gates, with the names and hashes of the experts they belong to (safetensors).

        Raises:
            NoExpertsError: there are no gates.
        """
        self.need_experts("save_gates")
        self.ensemble.save_gates(path, metadata)

    def load_gates(self, path: str | Path, strict: bool = True) -> dict[str, str]:
        """Read gates that were trained for the loaded experts.

        The model takes over the file's configuration (granularity, pooling, ...), network by network.

        Args:
            path: a file of `save_gates`.
            strict: refuse gates that were trained for other experts or another base. False loads them where
                every number has a place, and a warning lists what was passed over; see
                `checkpoint.load_gates`.

        Returns:
            The file's metadata.

        Raises:
            NoExpertsError: no experts are loaded.
            GateMismatchError: the gates do not fit, `differences` lists why; everything is as it was.
        """
        self.need_experts("load_gates")
        return self.ensemble.load_gates(path, strict)

    def need_experts(self, what: str) -> None:
        """Raise NoExpertsError where none is loaded.

        Args:
            what: the call that needs them.
        """
        if not self.ensemble.experts:
            raise NoExpertsError(
                f"{what}: no experts are loaded, and gates belong to experts: call load_expert() first"
            )


def check_new(ensemble: Ensemble, experts: Sequence[Expert], model: str) -> None:
    """Refuse experts whose name is taken, or which change none of the networks.

    Args:
        experts: those to come.
        model: what the networks belong to, as messages call it.

    Raises:
        ExpertLoadError: there is such a one.
    """
    present = ensemble.experts
    for number, expert in enumerate(experts):
        if expert.name in present or any(expert.name == other.name for other in experts[:number]):
            raise ExpertLoadError(
                f"an expert named {expert.name!r} is loaded already (loaded: {list(present)});"
                " give the new one another name or unload the old one"
            )
        if not set(expert.factors) & set(ensemble.networks):
            raise ExpertLoadError(
                f"expert {expert.name!r} changes {sorted(expert.factors)};"
                f" the networks of this {model} are {sorted(ensemble.networks)}"
            )


def without(ensemble: Ensemble, name: str) -> list[Expert]:
    """The experts but one.

    Raises:
        UnknownExpertError: no expert has this name.
    """
    if name not in ensemble.experts:
        raise UnknownExpertError(name, list(ensemble.experts))
    return [expert for expert in ensemble.experts.values() if expert.name != name]


def unused(expert: Expert, mixtures: Mapping[str, Mixture], model: str) -> list[str]:
    """What of an expert's file changes nothing in these mixtures, as sentences; others would not say."""
    sentences = [expert.report.summary()] if expert.report.ignored else []
    sentences += [
        f"{part}: not part of this {model}, {len(matrices)} matrices unused"
        for part, matrices in expert.factors.items()
        if part not in mixtures
    ]
    for part, mixture in mixtures.items():
        if absent := mixture.unmatched.get(expert.name):
            sentences.append(f"{part}: {len(absent)} matrices are not in the network, e.g. {absent[0]!r}")
    return sentences
