"""ComfyUI's MODEL, CLIP and VAE as what gates are trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from mole_diffusion.core.calling import Calling
from mole_diffusion.core.config import MoLEConfig
from mole_diffusion.core.ensemble import Ensemble
from mole_diffusion.core.errors import NoExpertsError
from mole_diffusion.core.experts import Expert
from mole_diffusion.core.fixed import fixed_mixture
from mole_diffusion.core.mixture import Mixture
from mole_diffusion.core.mixture_set import Choice
from mole_diffusion.core.records import Recorder
from mole_diffusion.pictures.auto import AutoMixture

from .auto import ClipReader, is_read
from .binding import networks_of, text_encoders_of
from .experts import ExpertSet
from .native_diffusion import DiffusionDenoiser
from .native_flow import FlowDenoiser, flows
from .weights import mean_weights_entry


def denoiser_of(model: Any, clip: Any, vae: Any, size: int | None = None) -> DiffusionDenoiser | FlowDenoiser:
    """Copies of ComfyUI's objects as a `mole_diffusion.pictures.denoiser.Denoiser`.

    Args:
        model, clip, vae: ComfyUI's objects, which stay as they are.
        size: height and width of the pictures in pixels; None for the model's own.

    Raises:
        TrainingError: this kind of model cannot be trained with.
    """
    kind = FlowDenoiser if flows(model.get_model_object("model_sampling")) else DiffusionDenoiser
    return kind(model, clip, vae, size)


class TrainingCopy:
    """Experts on copies of ComfyUI's objects: what `GateTrainer` trains, and its denoiser.

    Args:
        model, clip, vae: ComfyUI's objects, which stay as they are.
        experts: the experts; all of them count in training.
        config: form of the gates.
        size: height and width of the pictures in pixels; None for the model's own.

    Attributes:
        denoiser: the copies.
        call_defaults: what pictures are drawn with where nobody says.
        ensemble: the experts on its networks.

    Raises:
        NoExpertsError: there are no experts.
        TrainingError: this kind of model cannot be trained with.
        ExpertLoadError: an expert belongs to a base of another prediction type.
        InjectionError: an expert does not fit.
    """

    def __init__(
        self, model: Any, clip: Any, vae: Any, experts: ExpertSet, config: MoLEConfig, size: int | None = None
    ) -> None:
        if not experts.experts:
            raise NoExpertsError("There are no experts to train gates for: connect Load Expert.")
        self.denoiser = denoiser_of(model, clip, vae, size)
        self.call_defaults = self.denoiser.call_defaults
        texts = networks_of(self.denoiser.text_encoders)
        networks = {self.denoiser.part: self.denoiser.network, **texts}
        self.ensemble = Ensemble(networks, facts=self.denoiser.facts, config=config)
        self.ensemble.set_experts(experts.experts, unchecked=experts.unchecked)
        if isinstance(self.denoiser, FlowDenoiser):
            self.denoiser.texts_change = not self.mixtures.keys().isdisjoint(texts)

    @property
    def experts(self) -> Mapping[str, Expert]:
        """The experts by name."""
        return self.ensemble.experts

    @property
    def mixtures(self) -> Mapping[str, Mixture]:
        """The mixture of each network that an expert changes, by part."""
        return self.ensemble.mixtures

    def composing(
        self,
        *,
        active_experts: Sequence[str] | None = None,
        mixture: str | Mapping[str, float] | AutoMixture = "gates",
    ) -> AbstractContextManager[None]:
        """Which experts count inside the block, and how; see `WithExperts.composing` of the pipelines."""
        if isinstance(mixture, AutoMixture):
            return self._seeking(mixture, list(self.experts if active_experts is None else active_experts))
        active, weights = fixed_mixture(mixture, list(self.experts), active_experts)
        return self.ensemble.choosing(Choice(active, weights=weights, base_only=mixture == "none"))

    @contextmanager
    def _seeking(self, mixture: AutoMixture, active: list[str]) -> Iterator[None]:
        """Experts find their words and places by the texts of the block; all in full where nobody can."""
        if not is_read(self.mixtures.values()):
            with self.composing(mixture=dict.fromkeys(active, 1.0)):
                yield
            return
        encoders = self.denoiser.text_encoders
        reader = ClipReader(
            self.denoiser.clip,
            [self.experts[name] for name in active],
            text_encoders_of(encoders),
            list(self.experts),
            Calling(mixture.phrases, mixture.styles),
        )
        reader.attach(encoders)
        self.denoiser.reader = reader
        try:
            with self.ensemble.choosing(Choice(active, auto=reader)):
                yield
        finally:
            self.denoiser.reader = None
            reader.detach(encoders)

    def save_gates(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write the gates, with what they weighed in the last iteration."""
        recorder = Recorder()
        for mixture in self.mixtures.values():
            recorder.note(mixture)
        noted = mean_weights_entry(tuple(self.experts), recorder.weights.means())
        self.ensemble.save_gates(path, {**noted, **(metadata or {})})
