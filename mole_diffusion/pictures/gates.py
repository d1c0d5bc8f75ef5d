"""The gates of a diffusers pipeline: to and from files, and their training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole_diffusion.core.checkpoint import load_gates, read_gates_header, save_gates
from mole_diffusion.core.errors import NoExpertsError
from mole_diffusion.core.mixture import Mixture
from mole_diffusion.core.records import CallRecorder, GateWeights
from mole_diffusion.pictures.holding import ExpertsMixin

if TYPE_CHECKING:
    from mole_diffusion.pictures.training import Concept, TrainingConfig, TrainingResult


class GatesMixin(ExpertsMixin):
    """Gates for a pipeline that has experts."""

    _recorder = CallRecorder()

    def gate_weights(self) -> GateWeights:
        """The gate weights of the last call: network, group, step, branch, batch entry, expert, weight.

        Empty before the first call and after one in which no gate ran (fixed mixtures, the base model).
        """
        return self._recorder.rows

    def save_gates(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write the gates, with the names and hashes of the experts they belong to (safetensors).

        Raises:
            NoExpertsError: there are no gates.
        """
        self._need_experts("save_gates")
        save_gates(path, self._state.mixtures, metadata={**self._base_facts(), **(metadata or {})})

    def load_gates(self, path: str | Path, strict: bool = True) -> dict[str, str]:
        """Read gates that were trained for the loaded experts.

        The pipeline takes over the file's configuration (granularity, pooling, ...).

        Args:
            path: a file of `save_gates`.
            strict: refuse gates that were trained for other experts or another base. False loads them where
                every number has a place, and a warning lists what was passed over; see
                `checkpoint.load_gates`.

        Returns:
            The file's metadata.

        Raises:
            NoExpertsError: no experts are loaded.
            GateMismatchError: the gates do not fit, `differences` lists why; the pipeline is as it was.
        """
        self._need_experts("load_gates")
        header = read_gates_header(path)
        facts = self._base_facts()
        found: dict[str, str] = {}

        def fill(mixtures: Mapping[str, Mixture]) -> None:
            found.update(load_gates(path, mixtures, strict=strict, facts=facts))

        config = header.config(next(iter(header.parts)))
        if config == self._state.config:
            fill(self._state.mixtures)
        else:
            self._rebuild(dict(self._state.experts), config, finish=fill)
        return found

    def train_gates(
        self,
        prompts: str | Sequence[str],
        concepts: Mapping[str, Concept | Mapping[str, Any] | str] | Sequence[Concept] | None = None,
        config: TrainingConfig | None = None,
        callback: Callable[..., Any] | None = None,
        checkpoint_dir: str | Path | None = None,
    ) -> TrainingResult:
        """Train the gates for these prompts; networks and experts stay as they are.

        Arguments and result: see `mole_diffusion.training.GateTrainer`.

        Raises:
            NoExpertsError: no experts are loaded.
        """
        self._need_experts("train_gates")
        from mole_diffusion.pictures.training import GateTrainer

        return GateTrainer(
            self, prompts, concepts, config, callback=callback, checkpoint_dir=checkpoint_dir
        ).train()

    def _base_facts(self) -> dict[str, str]:
        """What a gates file should say about the base model beyond its shapes."""
        raise NotImplementedError

    def _need_experts(self, what: str) -> None:
        if not self._state.experts:
            raise NoExpertsError(
                f"{what}: no experts are loaded, and gates belong to experts: call load_expert() first"
            )
