"""`Gate`: the trainable part; `Group`: the matrices that share one. The mathematics is in `functional`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import functional
from .caches import ParameterCache
from .config import MoLEConfig
from .context import ForwardContext, GateValue, Voice
from .errors import ConfigError, InjectionError
from .matrices import MatrixPlan, MatrixSlot
from .modules import base_layer, site_shape
from .networks.base import CONTEXT, DENOISER, EMBEDDING, ENCODER, JOINT, ROW, TOKENS, NetworkMap, Role, Site
from .ranks import GateFactors
from .torch_state import in_backward, is_compiling, on_device

# `Group.solo` while a block runs without any expert.
BASE = -1


class Gate(nn.Module):
    """Parameters of one gate; everything float32.

    The projection starts at zero, so fresh gates weigh all experts equally.

    Args:
        config: the form of the gate.
        experts: N.
        features: d, outputs (gate_input "experts") or inputs ("hidden") of the matrix that computes the gate.
        context_features: the same for the gate of the text tokens in a group that has both streams.
        tokens: L for pooling "flatten".
        context_tokens: the same for the gate of the text tokens.
        role: of the network: an encoder of a denoiser's texts has no trained strength, and only a denoiser
            has timesteps to read.

    Attributes:
        projection: (N, d, N) for "experts", (N, d) for "own", (d, N) for "hidden"; with a leading L for
            "flatten".
        context_projection: the same for text tokens, or None.
        timestep_projection: (functional.TIMESTEP_FEATURES, N), or None.
        log_temperature: log tau.
        strength: factor of the mixed delta.
    """

    projection: nn.Parameter
    context_projection: nn.Parameter | None
    timestep_projection: nn.Parameter | None
    log_temperature: Tensor
    strength: Tensor

    def __init__(
        self,
        config: MoLEConfig,
        experts: int,
        features: int,
        context_features: int | None = None,
        tokens: int | None = None,
        context_tokens: int | None = None,
        role: Role = DENOISER,
    ) -> None:
        super().__init__()
        self.config = config
        self.experts = experts
        self.tokens = tokens
        self.context_tokens = context_tokens
        self.cache = ParameterCache()
        self.projection = nn.Parameter(torch.zeros(self._shape(features, tokens)))
        self.context_projection = None
        if context_features is not None:
            self.context_projection = nn.Parameter(torch.zeros(self._shape(context_features, context_tokens)))
        self.timestep_projection = None
        if config.timestep and role == DENOISER:
            self.timestep_projection = nn.Parameter(torch.zeros(functional.TIMESTEP_FEATURES, experts))
        self._scalar("log_temperature", math.log(config.temperature), learn=config.learn_temperature)
        strength = config.strength if role == DENOISER else config.text_strength
        # A word that has found its expert needs that expert's strength in a denoiser's text, and no more.
        self._scalar("strength", strength, learn=config.learn_strength and role != ENCODER)

    def _shape(self, features: int, tokens: int | None) -> tuple[int, ...]:
        body = (features, self.experts)
        if self.config.gate_input == "experts":
            body = (self.experts, *body)  # type: ignore[assignment]
        elif self.own:
            body = body[::-1]
        return body if tokens is None else (tokens, *body)

    @property
    def own(self) -> bool:
        """Whether each expert's logit reads that expert's output alone."""
        return self.config.gate_input == "own"

    def _scalar(self, name: str, value: float, *, learn: bool) -> None:
        if learn:
            self.register_parameter(name, nn.Parameter(torch.tensor(float(value))))
        else:
            self.register_buffer(name, torch.tensor(float(value)))

    @property
    def temperature(self) -> Tensor:
        """tau, above 0."""
        return self.cache.get("temperature", [self.log_temperature], self.log_temperature.exp)

    @property
    def indifferent(self) -> bool:
        """Whether it gives every active expert the same weight whatever it reads, as untrained gates of
        strength 1 do; False while it may be trained.
        """
        own = [self.projection, self.context_projection, self.timestep_projection, self.strength]
        read = [one for one in own if one is not None]
        if self.config.gate_function != "softmax" or self.config.strength != 1.0 or is_compiling():
            return False
        if torch.is_grad_enabled() and any(one.requires_grad for one in read):
            return False

        def build() -> Tensor:
            silent = not any(bool(one.any()) for one in read[:-1])
            return torch.tensor(silent and float(self.strength) == 1.0)

        return bool(self.cache.get("indifferent", read, build))

    def shares(self, plan: MatrixPlan, active: int, scales: Tensor | None) -> Tensor:
        """(N, R) what a gate weight of 1 gives to each rank of a matrix: its owner's strength and scale.

        Args:
            plan: of the matrix.
            active: number of active experts.
            scales: (N,) of the experts, or None for 1.
        """

        def build() -> Tensor:
            factor = functional.effective_strength(self.strength, float(active), self.experts)
            factor = on_device(factor, plan.owners.device)
            return plan.owners * (factor if scales is None else (factor * scales).unsqueeze(-1))

        parameters = [self.strength] if scales is None else [self.strength, scales]
        return self.cache.get((plan.layout, active, len(parameters)), parameters, build)

    def projection_for(self, stream: str) -> Tensor:
        """The projection that reads tokens of `stream`."""
        if stream == CONTEXT and self.context_projection is not None:
            return self.context_projection
        return self.projection

    def rank_logits(self, z: Tensor, factors: GateFactors, stream: str, real: Tensor | None = None) -> Tensor:
        """Logits over tau from the experts' outputs, in rank space.

        Args:
            z: (B, L, R) rank activations of all experts of the matrix, float32; for pooling "token" also one
                row per token of the batch (B * L, R).
            factors: of the matrix.
            stream: "tokens" or "context".
            real: (B, L, 1) share of each token in means, 0 for padding; None where all are real.
        Returns:
            (B, 1, N), or for pooling "token" as many rows as z has.
        """
        flat, root = self.config.pooling == "flatten", factors.root
        projection = self.projection_for(stream)

        def build() -> Tensor:
            tau = on_device(self.temperature, z.device)
            projected = factors.project(on_device(projection, z.device), own=self.own) / tau
            return projected if flat or isinstance(root, tuple) else torch.cat([projected, root], dim=1)

        projected = self.cache.get((stream, z.device), [projection, self.log_temperature], build)
        if self.config.pooling == "flatten":
            self._check_tokens(z.shape[1], stream)
            kept = functional.without_padding(z, real)
            return functional.expert_logits_flat(kept, projected, root).unsqueeze(1)
        if self.config.pooling == "mean":
            z = functional.mean_tokens(z, real)
        if isinstance(root, tuple):
            return functional.expert_logits(z, projected, root)
        return functional.joined_logits(z, projected, self.experts)

    def feature_logits(self, features: Tensor, stream: str, real: Tensor | None = None) -> Tensor:
        """Logits over tau from explicit features.

        Args:
            features: (B, L, d) group input ("hidden") or else (B, L, N, d) expert outputs, float32.
            stream: "tokens" or "context".
            real: (B, L, 1) share of each token in means, 0 for padding; None where all are real.
        Returns:
            (B, 1, N), or (B, L, N) for pooling "token".
        """
        projection = on_device(self.projection_for(stream), features.device)
        if self.own:
            own = torch.eye(self.experts, device=projection.device).unsqueeze(-2)
            projection = projection.unsqueeze(-1) * own
        tau = on_device(self.temperature, features.device)
        if self.config.pooling == "flatten":
            self._check_tokens(features.shape[1], stream)
            flat = functional.without_padding(features, real).flatten(1).unsqueeze(1)
            return functional.feature_logits(flat, projection.reshape(-1, self.experts)) / tau
        if self.config.pooling == "mean":
            features = functional.mean_tokens(features, real)
        return functional.feature_logits(features.flatten(2), projection.reshape(-1, self.experts)) / tau

    def _check_tokens(self, tokens: int, stream: str) -> None:
        text = stream == CONTEXT and self.context_projection is not None
        made_for = self.context_tokens if text else self.tokens
        if tokens != made_for:
            raise InjectionError(
                f"This gate was made for {made_for} tokens (pooling='flatten') and received {tokens}: "
                "flattened gates are bound to one resolution; use pooling='mean' or 'token' for any."
            )


@dataclass(eq=False)
class Group:
    """Matrices that share one gate.

    Attributes:
        name: canonical name of the matrix, layer, block or network.
        slots: its matrices in execution order.
        gate: its parameters.
        block: for composition "output" the module that runs once per expert; else None.
        solo: while that module runs: the one expert to apply, or BASE for none.
        returns: streams of the tensors that it returns.
        pooled: whether the gate reads a causal network's context, for all tokens and steps.
        reader: then the matrix whose experts' outputs for the context it reads; None where it reads the
            context itself.
        voices: what its gates say, by the stream that they read.
    """

    name: str
    slots: list[MatrixSlot]
    gate: Gate
    block: nn.Module | None = None
    solo: int | None = None
    returns: tuple[str, ...] = (TOKENS,)
    pooled: bool = False
    reader: MatrixSlot | None = None
    voices: dict[str, Voice] = field(init=False)

    def __post_init__(self) -> None:
        self.voices = {TOKENS: Voice(self.name)}
        if self.gate.context_projection is not None:
            self.voices[CONTEXT] = Voice(f"{self.name}.{CONTEXT}")

    @property
    def matrices(self) -> tuple[str, ...]:
        """Canonical names in execution order."""
        return tuple(slot.name for slot in self.slots)

    def voice(self, stream: str) -> Voice:
        """Where the gate of a stream keeps what it says."""
        return self.voices[stream if stream in self.voices else TOKENS]

    def label(self, stream: str) -> str:
        """Name under which the gate of a stream is recorded."""
        return self.voice(stream).label

    def first(self, stream: str) -> MatrixSlot:
        """The matrix at which the gate for `stream` is computed: the first to run that reads it."""
        if self.gate.context_projection is None:
            return self.slots[0]
        return first_reader(self.slots, CONTEXT if stream == CONTEXT else TOKENS)

    def leader(self, stream: str) -> MatrixSlot:
        """The matrix whose outputs or inputs that gate reads: the first, or one of the same source."""
        return leader_for(self.first(stream), self.slots)

    def evaluate(
        self,
        logits: Tensor | None,
        x: Tensor,
        context: ForwardContext,
        stream: str,
        real: Tensor | None = None,
    ) -> GateValue:
        """Turn logits into gate weights and keep them; without logits active experts have equal weights.

        Args:
            logits: over tau, (B, T, N), or one row per token of the batch (B * T, N); or None.
            x: the group's input, for batch size and device.
            context: state of the mixture.
            stream: what the tokens are.
            real: share of each token in means; see `Gate.rank_logits`.
        """
        batch = x.shape[0]
        if logits is None:
            return context.store(self.voice(stream), context.equal(batch, x.device))
        gate, active = self.gate, context.activation.mask
        strength = on_device(gate.strength, logits.device)
        if gate.timestep_projection is not None:
            logits = logits.view(batch, -1, gate.experts) + self._timestep_logits(context, logits.device)
        rows = functional.rows_of(logits)
        if gate.config.gate_function == "sigmoid":
            weights = functional.sigmoid_weights(rows, active=active)
            strength = strength * functional.sigmoid_total(rows, active=active)
        else:
            weights = functional.gate_weights(rows, active=active)
        return context.store(self.voice(stream), GateValue(weights, batch, strength, in_backward(), real))

    def _timestep_logits(self, context: ForwardContext, device: torch.device) -> Tensor:
        """(B or 1, 1, N), over tau."""
        projection: Tensor | None = self.gate.timestep_projection
        assert projection is not None
        logits = context.time_features(device) @ on_device(projection, device)
        return logits / on_device(self.gate.temperature, device)


def first_reader(slots: Sequence[MatrixSlot], stream: str) -> MatrixSlot:
    """The first matrix that reads tokens of a stream, alone or in a joint sequence."""
    return next(slot for slot in slots if slot.stream in (stream, JOINT))


def leader_for(first: MatrixSlot, slots: Sequence[MatrixSlot]) -> MatrixSlot:
    """The matrix that a gate is read off when `first` runs: itself, or one that reads the same tensor."""
    if first.may_lead:
        return first
    return next((slot for slot in slots if slot.may_lead and slot.source == first.source), first)


def build_groups(
    network: nn.Module,
    slots: Mapping[str, MatrixSlot],
    layout: NetworkMap,
    experts: int,
    config: MoLEConfig,
    flatten_tokens: tuple[int, int] | int | None,
) -> list[Group]:
    """The groups of a network in execution order, each with fresh gates."""
    members: dict[str, list[Site]] = {}
    for site in layout.sites:
        if site.name in slots:
            members.setdefault(_group_name(site, config, layout.part), []).append(site)
    builder = _GateBuilder(network, layout, experts, config, flatten_tokens)
    pooled = layout.architecture.causal and config.pooling != "token"
    if pooled and config.composition == "output":
        raise ConfigError(
            f"composition='output' does not go with pooling={config.pooling!r} in the {layout.part}, "
            "which runs token by token: a gate for all tokens would read tokens to come; use pooling='token'."
        )
    groups = []
    for name, sites in members.items():
        first = sites[0]
        path = first.block_path if config.granularity == "block" else first.layer_path
        # A single matrix outside the block has the same mixture either way.
        block = network.get_submodule(path) if config.composition == "output" and path else None
        own = [slots[site.name] for site in sites]
        if pooled:
            reader, site = builder.context_reader(sites[0], slots)
            gate = builder.pooled_gate(reader, site)
            groups.append(Group(name, own, gate, pooled=True, reader=reader))
        elif block is None:
            groups.append(Group(name, own, builder.matrix_gate(own, sites)))
        else:
            returns = _returned(first, own, config)
            groups.append(Group(name, own, builder.block_gate(returns, sites), block, returns=returns))
    return groups


def _group_name(site: Site, config: MoLEConfig, part: str) -> str:
    if site.kind == ROW or (config.composition == "output" and site.block_path is None):
        return site.name
    names = {"matrix": site.name, "layer": site.layer, "block": site.block, "network": part}
    return names[config.granularity]


def _returned(site: Site, slots: list[MatrixSlot], config: MoLEConfig) -> tuple[str, ...]:
    """Streams of the tensors that the module of a group returns.

    Raises:
        ConfigError: it is not known how.
    """
    if len(site.returns) > 1 and (config.granularity != "block" or config.gate_input == "hidden"):
        raise ConfigError(
            f"{site.block!r} returns {' and '.join(site.returns)} apart: composition='output' goes with "
            "granularity='block' and gate_input='experts' there."
        )
    return site.returns or (JOINT if any(slot.stream == JOINT for slot in slots) else TOKENS,)


@dataclass(frozen=True)
class _GateBuilder:
    """Makes the gates of one network's groups."""

    network: nn.Module
    layout: NetworkMap
    experts: int
    config: MoLEConfig
    flatten_tokens: tuple[int, int] | int | None

    def matrix_gate(self, slots: list[MatrixSlot], sites: list[Site]) -> Gate:
        """The gate of a group whose first matrix computes it; with one more for the text stream."""
        streams = {slot.stream for slot in slots}
        per_stream = self.config.pooling == "token" or self.layout.architecture.text_gates
        if JOINT in streams or ({TOKENS, CONTEXT} <= streams and per_stream):
            firsts = [first_reader(slots, stream) for stream in (TOKENS, CONTEXT)]
        else:
            firsts = [slots[0]]
        leaders = [leader_for(first, slots) for first in firsts]
        side = 1 if self.config.gate_input == "hidden" else 0
        for leader in leaders:
            leader.leads = self.config.gate_input != "hidden"
        return self._gate([leader.shape[side] for leader in leaders], sites)

    def context_reader(self, first: Site, slots: Mapping[str, MatrixSlot]) -> tuple[MatrixSlot | None, Site]:
        """The matrix of a group's block that reads the context, and its site.

        Raises:
            ConfigError: no expert changes it, and the gate reads the experts' outputs.
        """
        inside = [site for site in self.layout.sites if site.stream == CONTEXT]
        if self.config.granularity != "network":
            inside = [site for site in inside if site.block == first.block]
        if self.config.gate_input == "hidden":
            return None, inside[0]
        found = next((site for site in inside if site.name in slots), None)
        if found is None:
            raise ConfigError(
                f"pooling={self.config.pooling!r} goes with gate_input='hidden' alone in {first.block!r}: no "
                "expert changes a matrix there that reads the context; use that, or pooling='token'."
            )
        return slots[found.name], found

    def pooled_gate(self, reader: MatrixSlot | None, site: Site) -> Gate:
        """The gate of a group that reads the context for all tokens."""
        if reader is not None:
            reader.leads = True
        shape = site_shape(base_layer(self.network.get_submodule(site.path)), site.rows)
        return self._gate([shape[0 if reader is not None else 1]], [site])

    def block_gate(self, returns: tuple[str, ...], sites: list[Site]) -> Gate:
        """The gate of a group whose module runs once per expert."""
        width = self._block_width(sites[0], (CONTEXT,) if returns == (CONTEXT,) else (TOKENS, JOINT))
        texts = JOINT in returns or {TOKENS, CONTEXT} <= set(returns)
        return self._gate([width, width] if texts else [width], sites)

    def _gate(self, features: list[int], sites: list[Site]) -> Gate:
        """Args: features: of the gate and, if it has one, that of the text tokens."""
        tokens: list[int | None] = [None, None]
        if self.config.pooling == "flatten":
            first = sites[0]
            own = CONTEXT if first.stream == CONTEXT and len(features) == 1 else TOKENS
            streams = (own, CONTEXT)[: len(features)]
            for index, stream in enumerate(streams):
                tokens[index] = self._tokens(first, stream)
        return Gate(
            self.config,
            self.experts,
            features[0],
            features[1] if len(features) > 1 else None,
            tokens[0],
            tokens[1],
            self.layout.role,
        )

    def _tokens(self, site: Site, stream: str) -> int:
        """Tokens that a flattened gate reads."""
        if site.stream == EMBEDDING:
            return 1
        return self.layout.architecture.tokens(self.network, site, stream, self.flatten_tokens)

    def _block_width(self, first: Site, streams: tuple[str, ...]) -> int:
        """Features of a block's or layer's input and output: what its first matrix of `streams` reads."""
        by_block = self.config.granularity == "block"
        for site in self.layout.sites:
            same = site.block == first.block if by_block else site.layer == first.layer
            if same and site.block_path is not None and site.stream in streams:
                return site_shape(base_layer(self.network.get_submodule(site.path)), site.rows)[1]
        raise InjectionError(f"{first.block!r} has no matrix that reads the block's tokens.")
