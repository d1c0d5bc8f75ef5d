"""`Group`: the matrices that share a gate, and `build_groups`, which makes those of a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import functional
from .config import MoLEConfig
from .context import ForwardContext
from .errors import ConfigError, InjectionError
from .gates import Gate
from .matrices import MatrixSlot
from .modules import base_layer, site_shape
from .networks.base import CONTEXT, EMBEDDING, JOINT, ROW, TOKENS, NetworkMap, Site, streams_of
from .torch_state import in_backward, on_device
from .values import GateValue, Voice

# `Group.solo` while a block runs without any expert.
BASE = -1


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

    def place(self, stream: str) -> str:
        """What a place of this stream is called, whether or not the gate tells it from the tokens."""
        return f"{self.name}.{CONTEXT}" if stream == CONTEXT else self.name

    @property
    def places(self) -> list[str]:
        """Names of the places where tokens may have weights of their own."""
        read = {stream for slot in self.slots for stream in streams_of(slot.stream)}
        return [self.place(stream) for stream in (TOKENS, CONTEXT) if stream in read]

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
        if gate.prior is not None:
            rows = rows + on_device(gate.prior, rows.device)
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
