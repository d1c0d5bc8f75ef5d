"""The experts of a diffusers pipeline: loading, taking away, and which of them count in the next forwards."""

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from mole_diffusion.core.bases import check_prediction
from mole_diffusion.core.config import MoLEConfig
from mole_diffusion.core.errors import ExpertLoadError, InjectionError, NoExpertsError, UnknownExpertError
from mole_diffusion.core.experts import Expert, load_expert
from mole_diffusion.core.mixture import Mixture, inject
from mole_diffusion.methods.fixed import fixed_mixture
from mole_diffusion.methods.prepared import Prepared, Request
from mole_diffusion.methods.routing import ROUTED, routed
from mole_diffusion.methods.stand_in import StandIn
from mole_diffusion.pictures.sources import find_expert_file
from mole_diffusion.pictures.triggers import TriggerWords, vectors_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Composition:
    """Which experts count, and how, in the forwards to come."""

    active: Sequence[str] | None = None
    scales: Mapping[str, float] | None = None
    regions: Mapping[str, torch.Tensor] | None = None
    latent_size: tuple[int, int] | None = None
    weights: Mapping[str, float] | None = None
    base_only: bool = False

    def apply(self, mixtures: Mapping[str, Mixture]) -> None:
        """Set every network's mixture to this. Text tokens have no place in the picture: no region there."""
        for part, mixture in mixtures.items():
            if self.base_only:
                mixture.disable()
                continue
            in_picture = part == "unet"
            mixture.enable()
            mixture.activate(
                self.active,
                expert_scales=self.scales,
                region_masks=self.regions if in_picture else None,
                latent_size=self.latent_size if in_picture else None,
                weights=self.weights,
            )


@dataclass(eq=False)
class ExpertState:
    """What the pipelines around the same networks know about their experts."""

    config: MoLEConfig = field(default_factory=MoLEConfig)
    experts: dict[str, Expert] = field(default_factory=dict)
    mixtures: dict[str, Mixture] = field(default_factory=dict)
    composition: Composition = field(default_factory=Composition)
    networks: dict[str, nn.Module] = field(default_factory=dict)
    triggers: list[TriggerWords] = field(default_factory=list)

    def apply(self, composition: Composition) -> None:
        """Let this count in the forwards to come; the base alone knows no trigger words."""
        composition.apply(self.mixtures)
        for words in self.triggers:
            words.show(not composition.base_only)
        self.composition = composition

    @classmethod
    def of(cls, networks: Mapping[str, nn.Module]) -> "ExpertState | None":
        """The state of the experts that these very networks carry."""
        return next((one for one in _states if one.experts and one.networks == networks), None)


# So that a pipeline built from another one's parts, by whatever way, finds the experts on them.
_states: weakref.WeakSet[ExpertState] = weakref.WeakSet()


class ExpertsMixin:
    """Experts and their mixture; the pipeline class that uses it says which networks there are."""

    _expert_state: ExpertState | None = None

    def _networks(self) -> dict[str, nn.Module]:
        """The networks that experts can change, by part."""
        raise NotImplementedError

    def _tokenizers(self) -> dict[str, Any]:
        """The tokenizer of each text encoder."""
        raise NotImplementedError

    def _flatten_tokens(self) -> dict[str, int | None]:
        """Tokens per network that `pooling="flatten"` is sized for; None for the UNet's own size."""
        raise NotImplementedError

    @property
    def _state(self) -> ExpertState:
        # Made on first use: diffusers builds pipelines from the signature of __init__, which stays its own.
        state = self._expert_state
        if state is None or not state.experts:
            state = ExpertState.of(_unwrapped(self._networks())) or state or ExpertState()
            self._expert_state = state
        return state

    @property
    def experts(self) -> Mapping[str, Expert]:
        """The loaded experts by name, in the order in which they were loaded."""
        return MappingProxyType(self._state.experts)

    @property
    def mixtures(self) -> Mapping[str, Mixture]:
        """The mixture of each network that experts change: "unet" and perhaps "text_encoder"."""
        return MappingProxyType(self._state.mixtures)

    @property
    def mole_config(self) -> MoLEConfig:
        """How gates are built; change it with `configure`."""
        return self._state.config

    def load_expert(
        self,
        source: str | Path,
        name: str | None = None,
        scale: float = 1.0,
        *,
        weight_name: str | None = None,
        rank: int | None = None,
        check_base: bool = True,
        **hub_options: Any,
    ) -> Expert:
        """Load a LoRA file as one more expert.

        Gates belong to a set of experts. A new expert makes fresh gates for the whole set: **gates trained
        so far are lost** (a warning says so). Load all experts first, then train or `load_gates`.

        Args:
            source: a safetensors file, a folder with one, or a hub id ("owner/name").
            name: how prompts and arguments call the expert; None takes it from the file, folder or hub id.
            scale: factor on everything this expert does.
            weight_name: which file of a folder or hub repository.
            rank: compress deltas of higher rank to this one; None keeps them exact (`Expert.report.errors`).
            check_base: False loads a file whose header names another prediction type than the base's, for
                headers that are wrong. Shapes are checked in any case.
            hub_options: for `huggingface_hub.snapshot_download` (revision, cache_dir, local_files_only, ...).

        Raises:
            ExpertLoadError: no such file, not a LoRA for these networks, the name is taken, or a trigger
                word is a token already.
            InjectionError: the file's matrices do not fit these networks.

        Embeddings in the file are added to tokenizer and text encoder under their trigger words, and taken
        away with the expert. With `mixture="none"` the words mean nothing special.

        After an error the pipeline is as it was before.
        """
        path, own_name = find_expert_file(source, weight_name, **hub_options)
        expert = load_expert(path, name=name or own_name, scale=scale, rank=rank)
        return self.add_expert(expert, check_base=check_base)

    def add_expert(self, expert: Expert, *, check_base: bool = True) -> Expert:
        """`load_expert` for an `Expert` that is in memory already."""
        experts = self._state.experts
        if expert.name in experts:
            raise ExpertLoadError(
                f"an expert named {expert.name!r} is loaded already (loaded: {list(experts)});"
                " give the new one another name or unload the old one"
            )
        if not set(expert.factors) & set(self._networks()):
            raise ExpertLoadError(
                f"expert {expert.name!r} changes {sorted(expert.factors)};"
                f" the networks of this pipeline are {sorted(self._networks())}"
            )
        scheduler = getattr(self, "scheduler", None)
        if check_base and scheduler is not None and scheduler.config.get("prediction_type"):
            check_prediction(expert, scheduler.config["prediction_type"])
        self._rebuild({**experts, expert.name: expert}, self._state.config)
        unused = _unused(expert, self._state.mixtures, self._tokenizers())
        if unused:
            logger.warning("expert %r is used in part: %s", expert.name, "; ".join(unused))
        return expert

    def unload_expert(self, name: str) -> None:
        """Take an expert away. The others get fresh gates: **gates trained so far are lost**.

        To leave an expert out of a picture without losing the gates, use `active_experts` instead.

        Raises:
            UnknownExpertError: no expert has this name.
        """
        if name not in self._state.experts:
            raise UnknownExpertError(name, list(self._state.experts))
        self._rebuild({k: e for k, e in self._state.experts.items() if k != name}, self._state.config)

    def configure(self, config: MoLEConfig) -> None:
        """Give all experts fresh gates of another kind (granularity, pooling, ...); trained ones are lost."""
        self._rebuild(dict(self._state.experts), config)

    def eject(self) -> None:
        """Take everything away: the networks are bitwise what they were before the first expert."""
        self._rebuild({}, self._state.config)

    def detach_experts(self) -> ExpertState:
        """Take experts, gates and trigger words off, bitwise, and hand them over for `attach_experts`.

        For hosts that serve several users with one base model, one after the other.
        """
        state = self._state
        parked = replace(state)
        _detach(state.mixtures, state.triggers)
        empty = ExpertState(config=state.config, networks=state.networks)
        vars(state).update(vars(empty))
        return parked

    def attach_experts(self, parked: ExpertState) -> None:
        """Put on what `detach_experts` took off the same networks; gates are as they were.

        Raises:
            InjectionError: the pipeline has experts, or other networks.
        """
        state = self._state
        if state.experts:
            raise InjectionError(f"there are the experts {list(state.experts)}; detach_experts() first")
        if parked.experts and parked.networks != _unwrapped(self._networks()):
            raise InjectionError("these experts were taken off other networks")
        for mixture in parked.mixtures.values():
            mixture.attach()
        for words in parked.triggers:
            words.attach()
        vars(state).update(vars(parked))
        _states.add(state)

    @contextmanager
    def composing(
        self,
        *,
        active_experts: Sequence[str] | None = None,
        expert_scales: Mapping[str, float] | None = None,
        region_masks: Mapping[str, torch.Tensor] | None = None,
        latent_size: tuple[int, int] | None = None,
        mixture: str | Mapping[str, float] | Prepared = "gates",
    ) -> Iterator[None]:
        """Choose how experts count in every forward inside the `with` block, whoever runs it.

        For pipelines built around the same networks (ControlNet, img2img); `__call__` of this pipeline uses
        it too. Outside, all experts are active with their gates.

        Args:
            active_experts: the experts that count; None is all.
            expert_scales: factors in place of those given to `load_expert`.
            region_masks: expert name -> (H, W) tensor in 0..1.
            latent_size: (height, width) of the latents that the masks belong to.
            mixture: "gates"; "la" (weight 1 each); "nla" (1/N each); "none" (the base model); "switch" (one
                expert per step, in turn); "composite" (mean of the experts' predictions); a weight per
                expert, which also names the active ones; or what `baselines.prepare` made.

        Raises:
            NoExpertsError: something was asked of experts and none is loaded.
            GateMismatchError: a prepared mixture was made for another base or other experts.
            UnknownExpertError, AllExpertsMaskedError, RegionMaskError, ConfigError: see `Mixture.activate`.
        """
        if isinstance(mixture, Prepared) or mixture in ROUTED:
            request = Request(active_experts, expert_scales, region_masks, latent_size)
            engaged = (
                mixture.engaged(self, request)
                if isinstance(mixture, Prepared)
                else routed(self, str(mixture), request)
            )
            with engaged:
                yield
            return
        state = self._state
        plain = active_experts is None and not expert_scales and not region_masks
        if not state.experts and not (plain and mixture in ("gates", "none")):
            raise NoExpertsError("no experts are loaded: call load_expert() first")
        active, weights = fixed_mixture(mixture, list(state.experts), active_experts)
        before = state.composition
        now = Composition(
            active, expert_scales, region_masks, latent_size, weights, base_only=mixture == "none"
        )
        try:
            # Also for the base model: a misspelt name must not pass only because nothing is drawn with it.
            replace(now, base_only=False).apply(state.mixtures)
            state.apply(now)
            yield
        finally:
            state.apply(before)

    @contextmanager
    def standing_in(self, others: StandIn) -> Iterator[None]:
        """Other experts and gates inside the `with` block; afterwards those from before, bitwise."""
        state = self._state
        before = replace(state)
        for mixture in before.mixtures.values():
            mixture.eject()
        try:
            with others.attached(self._networks(), self._inject_all) as mixtures:
                state.experts, state.mixtures, state.config = others.experts, mixtures, others.config
                state.composition = Composition()
                state.composition.apply(mixtures)
                yield
        finally:
            vars(state).update(vars(before))
            for mixture in before.mixtures.values():
                mixture.attach()

    def _rebuild(
        self,
        experts: dict[str, Expert],
        config: MoLEConfig,
        finish: Callable[[dict[str, Mixture]], object] | None = None,
    ) -> None:
        """Replace the mixtures by fresh ones for these experts; on any error everything is as before.

        Args:
            finish: called with the new mixtures (to load gates into them) before the old ones are given up.
        """
        state = self._state
        for words in state.triggers:
            words.check_removable()
        old, old_words = state.mixtures, state.triggers
        new: dict[str, Mixture] = {}
        new_words: list[TriggerWords] = []
        _detach(old, old_words)
        try:
            self._inject_all(experts, config, new)
            self._add_words(experts.values(), new_words)
            if finish is not None:
                finish(new)
        except BaseException:
            _detach(new, new_words)
            for mixture in old.values():
                mixture.attach()
            for words in old_words:
                words.attach()
            raise
        trained = [part for part, mixture in old.items() if _is_trained(mixture)]
        if trained and finish is None and experts:
            logger.warning(
                "the gates trained for %s are lost: the expert set or the configuration changed", trained
            )
        state.experts, state.mixtures, state.config = experts, new, config
        state.networks, state.triggers = _unwrapped(self._networks()), new_words
        _states.add(state)
        state.composition = Composition()

    def _inject_all(self, experts: dict[str, Expert], config: MoLEConfig, into: dict[str, Mixture]) -> None:
        chosen = list(experts.values())
        for part, network in self._networks().items():
            if any(expert.factors.get(part) for expert in chosen):
                into[part] = inject(
                    network, chosen, config, part=part, flatten_tokens=self._flatten_tokens()[part]
                )

    def _add_words(self, experts: Iterable[Expert], into: list[TriggerWords]) -> None:
        """Let the tokenizers and text encoders know the experts' trigger words."""
        networks = self._networks()
        for part, tokenizer in self._tokenizers().items():
            if words := vectors_of(experts, part):
                found = TriggerWords(tokenizer, networks[part], words)
                found.attach()
                into.append(found)


def _detach(mixtures: Mapping[str, Mixture], triggers: Iterable[TriggerWords]) -> None:
    for mixture in mixtures.values():
        mixture.eject()
    for words in triggers:
        words.detach()


def _unwrapped(networks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The networks inside what `torch.compile` made of them."""
    return {part: getattr(network, "_orig_mod", network) for part, network in networks.items()}


def _unused(expert: Expert, mixtures: Mapping[str, Mixture], tokenizers: Mapping[str, Any]) -> list[str]:
    """What of an expert's file changes nothing here, as sentences; diffusers would not say."""
    sentences = [expert.report.summary()] if expert.report.ignored else []
    sentences += [
        f"{part}: not part of this pipeline, {len(matrices)} matrices unused"
        for part, matrices in expert.factors.items()
        if part not in mixtures
    ]
    sentences += [
        f"{part}: not part of this pipeline, the embedding of {word!r} is unused"
        for word, found in expert.embeddings.items()
        for part in found
        if part not in tokenizers
    ]
    for part, mixture in mixtures.items():
        absent = mixture.unmatched.get(expert.name)
        if absent:
            sentences.append(f"{part}: {len(absent)} matrices are not in the network, e.g. {absent[0]!r}")
    return sentences


def _is_trained(mixture: Mixture) -> bool:
    """Whether any gate has left the zero projection it starts with."""
    return any(bool(group.gate.projection.any()) for group in mixture.groups)
