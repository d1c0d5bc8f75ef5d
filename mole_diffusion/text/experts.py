"""`compose(model, experts)`: experts and gates on a model that one has already."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mole_diffusion.core.config import MoLEConfig
from mole_diffusion.core.ensemble import Ensemble
from mole_diffusion.core.errors import (
    ConfigError,
    InjectionError,
    NoExpertsError,
)
from mole_diffusion.core.experts import Expert, load_expert
from mole_diffusion.core.fixed import FIXED, fixed_mixture
from mole_diffusion.core.holding import HoldsExperts, check_new, unused, without
from mole_diffusion.core.mixture_set import Choice
from mole_diffusion.core.networks import find_network
from mole_diffusion.core.networks.t5 import READER, WRITER
from mole_diffusion.core.records import GateWeights, MeanRecorder
from mole_diffusion.core.routing import ROUTES, Route
from mole_diffusion.sources import find_expert_file
from mole_diffusion.text.composed import MixtureWord

if TYPE_CHECKING:
    from mole_diffusion.text.training import TextTrainingConfig, TextTrainingResult

logger = logging.getLogger(__name__)


class Seq2SeqExperts(HoldsExperts):
    """Experts and gates on a transformers model that reads a text and writes one.

    They are hooks on the model's encoder and decoder: the model is as it was, and `model.generate`,
    `Trainer` and `pipeline` go on working, with the experts.

    Args:
        model: of the T5 family.
        config: the form of the gates.
        flatten_tokens: for pooling "flatten", the one number of tokens that every text is padded to.

    Raises:
        InjectionError: the model is of no known kind.

    Attributes:
        model: as given.
    """

    def __init__(
        self, model: nn.Module, *, config: MoLEConfig | None = None, flatten_tokens: int | None = None
    ) -> None:
        self.model: Any = model
        networks = stacks_of(model)
        self._ensemble = Ensemble.carrying(networks) or Ensemble(
            networks,
            facts={},
            flatten_tokens=dict.fromkeys(networks, flatten_tokens),
            config=config or MoLEConfig(),
        )
        self._recorder: MeanRecorder | None = None

    @property
    def ensemble(self) -> Ensemble:
        """The experts on the model's two stacks, "encoder" and "decoder"."""
        return self._ensemble

    def load_expert(
        self,
        source: str | Path,
        name: str | None = None,
        scale: float = 1.0,
        *,
        weight_name: str | None = None,
        rank: int | None = None,
        **hub_options: Any,
    ) -> Expert:
        """Load a LoRA as one more expert; gates trained so far are lost, and a warning says so.

        Args:
            source: a PEFT folder (of `adapter_model.bin` nothing is run), a safetensors file, or a hub id.
            name: how arguments call the expert; None takes it from the file, folder or hub id.
            scale: factor on everything this expert does; with 0 it is left out until a call says otherwise.
            weight_name: which file of a folder or hub repository.
            rank: compress deltas of higher rank to this one; None keeps them exact.
            hub_options: for `huggingface_hub.snapshot_download` (revision, cache_dir, local_files_only, ...).

        Raises:
            ExpertLoadError: no such file, not a LoRA for such a model, or the name is taken.
            InjectionError: its matrices do not fit this model.

        After an error everything is as it was before.
        """
        return self.load_experts(
            {name: source} if name else [source], scale, weight_name=weight_name, rank=rank, **hub_options
        )[0]

    def load_experts(
        self,
        sources: Iterable[str | Path] | Mapping[str, str | Path],
        scale: float = 1.0,
        *,
        weight_name: str | None = None,
        rank: int | None = None,
        **hub_options: Any,
    ) -> list[Expert]:
        """Load several at once, all or none; see `load_expert`.

        Args:
            sources: of `load_expert`, or name -> source.
            scale, weight_name, rank, hub_options: see `load_expert`.
        """
        named = sources.items() if isinstance(sources, Mapping) else [(None, source) for source in sources]
        found = []
        for name, source in named:
            path, own = find_expert_file(source, weight_name, **hub_options)
            found.append(load_expert(path, name=name or own, scale=scale, rank=rank))
        return self.add_experts(found)

    def add_expert(self, expert: Expert) -> Expert:
        """`load_expert` for an `Expert` that is in memory already."""
        return self.add_experts([expert])[0]

    def add_experts(self, experts: Sequence[Expert]) -> list[Expert]:
        """`load_experts` for those that are in memory already."""
        check_new(self.ensemble, experts, "model")
        self.ensemble.set_experts([*self.experts.values(), *experts])
        for expert in experts:
            if sentences := unused(expert, self.mixtures, "model"):
                logger.warning("expert %r is used in part: %s", expert.name, "; ".join(sentences))
        return list(experts)

    def unload_expert(self, name: str) -> None:
        """Take an expert away. The others get fresh gates: gates trained so far are lost.

        Raises:
            UnknownExpertError: no expert has this name.
        """
        self.ensemble.set_experts(without(self.ensemble, name))

    @contextmanager
    def active(
        self,
        active_experts: Sequence[str] | None = None,
        *,
        expert_scales: Mapping[str, float] | None = None,
        mixture: MixtureWord = "gates",
    ) -> Iterator[None]:
        """Choose how experts count in every forward inside the `with` block, whoever runs it.

        Outside, all experts are active with their gates.

        Args:
            active_experts: the experts that count, the rest is renormalised; None is all.
            expert_scales: factor per expert, in place of the one it was loaded with; one of 0 is left out.
            mixture: "gates"; "la" (every expert with weight 1); "nla" (1/N); "none" (the base model,
                bitwise); "arrow" or "energy" (each matrix weighs by itself, without training), or a `Route`
                for other settings of them; or a weight per expert, which also names the active ones.

        Raises:
            NoExpertsError: something was asked of experts and none is loaded.
            UnknownExpertError, AllExpertsMaskedError, ConfigError: see `Mixture.activate`.
        """
        ensemble = self.ensemble
        plain = active_experts is None and not expert_scales
        if not ensemble.experts and not (plain and mixture in ("gates", "none")):
            raise NoExpertsError("no experts are loaded: call load_expert() first")
        with ensemble.choosing(_choice(list(ensemble.experts), active_experts, expert_scales, mixture)):
            yield

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the gates' mean weights in the `with` block for `gate_weights`."""
        recorder = MeanRecorder()
        with recorder.watching(self.ensemble.mixtures):
            yield
        self._recorder = recorder

    def gate_weights(self) -> GateWeights:
        """The gate weights of the last call or `recording`: of each gate and row of the batch the mean.

        Empty before the first call and after one in which no gate ran (fixed mixtures, the base model).
        """
        return GateWeights() if self._recorder is None else self._recorder.weights

    def train_gates(
        self,
        examples: Any,
        tokenizer: Any,
        config: TextTrainingConfig | None = None,
        *,
        validation: Any = None,
        callback: Callable[..., Any] | None = None,
        checkpoint_dir: str | Path | None = None,
        resume: bool | None = None,
    ) -> TextTrainingResult:
        """Train the gates on examples; model and experts stay as they are.

        Args: see `mole_diffusion.text.training.train_gates`.

        Raises:
            NoExpertsError: no experts are loaded.
        """
        self.need_experts("train_gates")
        from mole_diffusion.text.training import train_gates

        return train_gates(
            self, tokenizer, examples, config,
            validation=validation, callback=callback, checkpoint_dir=checkpoint_dir, resume=resume,
        )  # fmt: skip

    def begin_gates(self, examples: Any, tokenizer: Any) -> Mapping[str, float]:
        """Let gates that nobody has trained begin with the experts that know a task, for loops of others.

        `train_gates` does it by itself. Args, result: see `mole_diffusion.text.training.begin_gates`.

        Raises:
            NoExpertsError: no experts are loaded.
            ConfigError: the examples are none.
        """
        self.need_experts("begin_gates")
        from mole_diffusion.text.training import begin_gates

        return begin_gates(self, tokenizer, examples)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = next(self.model.parameters()).device
        return device


def _choice(
    known: Sequence[str],
    active: Sequence[str] | None,
    scales: Mapping[str, float] | None,
    mixture: MixtureWord,
) -> Choice:
    """What counts, as `Seq2SeqExperts.active` is told."""
    if isinstance(mixture, str) and mixture in ROUTES:
        mixture = Route(mixture)
    if isinstance(mixture, Route):
        return Choice(active, scales, route=mixture)
    if isinstance(mixture, str) and mixture not in FIXED:
        words = [*FIXED, *ROUTES]
        raise ConfigError(f"mixture is {mixture!r}, expected one of {words} or a weight per expert")
    chosen, weights = fixed_mixture(mixture, known, active)
    return Choice(chosen, scales, weights=weights, base_only=mixture == "none")


def stacks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The networks of a model that experts can change: encoder and decoder.

    Raises:
        InjectionError: it is of no known kind.
    """
    stacks = {name: getattr(getattr(model, "model", model), name, None) for name in (READER, WRITER)}
    found = {name: stack for name, stack in stacks.items() if isinstance(stack, nn.Module)}
    if not found or any(find_network(stack, name) is None for name, stack in found.items()):
        raise InjectionError(
            f"{type(model).__name__} has no encoder and decoder of the T5 family (T5, T5 1.1, Flan-T5, mT5)."
        )
    return found


def compose(
    model: nn.Module,
    experts: Iterable[str | Path | Expert] = (),
    config: MoLEConfig | None = None,
    *,
    flatten_tokens: int | None = None,
) -> Seq2SeqExperts:
    """Put experts with fresh gates on a transformers model that one has already.

    Args:
        model: of the T5 family; it is not changed, only hooked.
        experts: PEFT folders, files, hub ids, or experts in memory.
        config: the form of the gates; the default mixes token by token.
        flatten_tokens: see `Seq2SeqExperts`.

    Returns:
        What holds them: `with composed.active(["one"]): model.generate(...)`.
    """
    composed = Seq2SeqExperts(model, config=config, flatten_tokens=flatten_tokens)
    ready = []
    for one in experts:
        if not isinstance(one, Expert):
            path, name = find_expert_file(one)
            one = load_expert(path, name=name)
        ready.append(one)
    if ready:
        composed.add_experts(ready)
    return composed
