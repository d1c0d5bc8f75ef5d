"""What training and export know of a model with experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch

from mole_diffusion.core.ensemble import Ensemble
from mole_diffusion.core.experts import Expert
from mole_diffusion.core.mixture import Mixture
from mole_diffusion.core.records import GateWeights
from mole_diffusion.core.routing import Route

#: What `mixture=` may be: a word, a weight per expert, or a route.
MixtureWord = str | Mapping[str, float] | Route


class Composed(Protocol):
    """A model with experts; see `Seq2SeqExperts`."""

    model: Any

    @property
    def ensemble(self) -> Ensemble:
        """The experts on its stacks."""

    @property
    def experts(self) -> Mapping[str, Expert]:
        """The experts by name."""

    @property
    def mixtures(self) -> Mapping[str, Mixture]:
        """The mixture of each stack that experts change."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""

    def active(
        self,
        active_experts: Sequence[str] | None = None,
        *,
        expert_scales: Mapping[str, float] | None = None,
        mixture: MixtureWord = "gates",
    ) -> AbstractContextManager[None]:
        """Choose how experts count in the `with` block."""

    def recording(self) -> AbstractContextManager[None]:
        """Keep the gates' mean weights in the `with` block."""

    def gate_weights(self) -> GateWeights:
        """What was kept."""

    def save_gates(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write the gates."""


class Reading(Composed, Protocol):
    """One that has a tokenizer too; see `MoLEForSeq2SeqLM`."""

    tokenizer: Any

    def read(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Token ids and mask of texts, padded, where the model is."""
