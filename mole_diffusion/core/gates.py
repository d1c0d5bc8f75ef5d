"""`Gate`: the trainable part; `Group`: the matrices that share one. The mathematics is in `functional`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import functional
from .architectures import CONTEXT, EMBEDDING, TOKENS, UNET, MatrixSite, NetworkMap
from .config import MoLEConfig
from .context import ForwardContext, GateValue, in_backward
from .errors import ConfigError, InjectionError
from .matrices import MatrixSlot, base_layer, matrix_shape

# Text tokens of CLIP; what a flattened gate on text assumes unless told.
CLIP_TOKENS = 77
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
        part: of the pipeline: text encoders have a strength of their own, and no timesteps to read.

    Attributes:
        projection: (N, d, N) for "experts", (d, N) for "hidden"; with a leading L for "flatten".
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
        part: str = UNET,
    ) -> None:
        super().__init__()
        self.config = config
        self.experts = experts
        self.tokens = tokens
        self.projection = nn.Parameter(torch.zeros(self._shape(features, tokens)))
        self.context_projection = None
        if context_features is not None:
            self.context_projection = nn.Parameter(torch.zeros(self._shape(context_features, None)))
        self.timestep_projection = None
        if config.timestep and part == UNET:
            self.timestep_projection = nn.Parameter(torch.zeros(functional.TIMESTEP_FEATURES, experts))
        self._scalar("log_temperature", math.log(config.temperature), learn=config.learn_temperature)
        if part == UNET:
            self._scalar("strength", config.strength, learn=config.learn_strength)
        else:
            # A word that has found its expert needs that expert's strength, and no more.
            self._scalar("strength", config.text_strength, learn=False)

    def _shape(self, features: int, tokens: int | None) -> tuple[int, ...]:
        body = (features, self.experts)
        if self.config.gate_input == "experts":
            body = (self.experts, *body)  # type: ignore[assignment]
        return body if tokens is None else (tokens, *body)

    def _scalar(self, name: str, value: float, *, learn: bool) -> None:
        if learn:
            self.register_parameter(name, nn.Parameter(torch.tensor(float(value))))
        else:
            self.register_buffer(name, torch.tensor(float(value)))

    @property
    def temperature(self) -> Tensor:
        """tau, above 0."""
        return self.log_temperature.exp()

    def projection_for(self, stream: str) -> Tensor:
        """The projection that reads tokens of `stream`."""
        if stream == CONTEXT and self.context_projection is not None:
            return self.context_projection
        return self.projection

    def rank_logits(self, z: Tensor, ups: list[tuple[int, Tensor]], gram: Tensor, stream: str) -> Tensor:
        """Logits from the experts' outputs, in rank space.

        Args:
            z: (B, L, R) rank activations of all experts of the matrix, float32.
            ups: per expert that has the matrix, its index and s_i B_i (d, r_i), float32, in the order of z.
            gram: (R, R) block-diagonal s_i^2 B_i^T B_i.
            stream: "tokens" or "context".
        Returns:
            (B, 1, N), or (B, L, N) for pooling "token".
        """
        projection = self.projection_for(stream).to(z.device)
        projected = torch.cat([up.T @ projection[..., i, :, :] for i, up in ups], dim=-2)
        if self.config.pooling == "flatten":
            self._check_tokens(z.shape[1])
            return functional.expert_logits_flat(z, projected, gram).unsqueeze(1)
        if self.config.pooling == "mean":
            z = z.mean(1, keepdim=True)
        return functional.expert_logits(z, projected, gram)

    def feature_logits(self, features: Tensor, stream: str) -> Tensor:
        """Logits from explicit features.

        Args:
            features: (B, L, d) group input ("hidden") or (B, L, N, d) expert outputs ("experts"), float32.
            stream: "tokens" or "context".
        Returns:
            (B, 1, N), or (B, L, N) for pooling "token".
        """
        projection = self.projection_for(stream).to(features.device)
        if self.config.pooling == "flatten":
            self._check_tokens(features.shape[1])
            flat = features.flatten(1).unsqueeze(1)
            return functional.feature_logits(flat, projection.reshape(-1, self.experts))
        if self.config.pooling == "mean":
            features = features.mean(1, keepdim=True)
        return functional.feature_logits(features.flatten(2), projection.reshape(-1, self.experts))

    def _check_tokens(self, tokens: int) -> None:
        if tokens != self.tokens:
            raise InjectionError(
                f"This gate was made for {self.tokens} tokens (pooling='flatten') and received {tokens}: "
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
    """

    name: str
    slots: list[MatrixSlot]
    gate: Gate
    block: nn.Module | None = None
    solo: int | None = None

    @property
    def matrices(self) -> tuple[str, ...]:
        """Canonical names in execution order."""
        return tuple(slot.name for slot in self.slots)

    def label(self, stream: str) -> str:
        """Name under which the gate of a stream is stored and recorded."""
        if stream == CONTEXT and self.gate.context_projection is not None:
            return f"{self.name}.{CONTEXT}"
        return self.name

    def leader(self, stream: str) -> MatrixSlot:
        """The matrix that computes the gate for `stream`: the first one in execution order."""
        if self.gate.context_projection is None:
            return self.slots[0]
        return next(slot for slot in self.slots if slot.stream == stream)

    def evaluate(self, logits: Tensor | None, x: Tensor, context: ForwardContext, stream: str) -> GateValue:
        """Turn logits into gate weights and keep them; without logits one expert has all the weight.

        Args:
            logits: (B, T, N) or None.
            x: the group's input, for batch size and device.
        """
        active = context.activation.active
        strength = self.gate.strength.to(x.device)
        if logits is None:
            weights = torch.zeros(x.shape[0], 1, self.gate.experts, device=x.device)
            weights[..., active[0]] = 1.0
        else:
            tau = self.gate.temperature.to(logits.device)
            if self.gate.timestep_projection is not None:
                logits = logits + self._timestep_logits(context, logits.device)
            if self.gate.config.gate_function == "sigmoid":
                weights = functional.sigmoid_weights(logits, tau, active)
                strength = strength * functional.sigmoid_total(logits, tau, active)
            else:
                weights = functional.gate_weights(logits, tau, active)
        value = GateValue(weights, strength, in_backward())
        return context.store(self.label(stream), value, trained=True)

    def _timestep_logits(self, context: ForwardContext, device: torch.device) -> Tensor:
        """(B or 1, 1, N)."""
        if context.timestep is None or self.gate.timestep_projection is None:
            raise InjectionError("Gates that read the timestep need the network to be called with one.")
        timestep = torch.as_tensor(context.timestep, device=device).reshape(-1, 1)
        return functional.timestep_features(timestep) @ self.gate.timestep_projection.to(device)


def build_groups(
    network: nn.Module,
    slots: Mapping[str, MatrixSlot],
    layout: NetworkMap,
    experts: int,
    config: MoLEConfig,
    flatten_tokens: tuple[int, int] | int | None,
) -> list[Group]:
    """The groups of a network in execution order, each with fresh gates."""
    members: dict[str, list[MatrixSite]] = {}
    for site in layout.sites:
        if site.name in slots:
            members.setdefault(_group_name(site, config, layout.part), []).append(site)
    groups = []
    for name, sites in members.items():
        first = sites[0]
        path = first.block_path if config.granularity == "block" else first.layer_path
        # A single matrix outside the block (proj_in, proj_out) has the same mixture either way.
        block = network.get_submodule(path) if config.composition == "output" and path else None
        tokens = None
        if config.pooling == "flatten":
            tokens = _count_tokens(first, network, layout.part, flatten_tokens)
        own = [slots[site.name] for site in sites]
        if block is not None:
            width = _block_width(network, layout, first, config.granularity)
            gate = Gate(config, experts, width, tokens=tokens, part=layout.part)
        else:
            gate = _matrix_gate(own, config, experts, tokens, layout.part)
        groups.append(Group(name, own, gate, block))
    return groups


def _group_name(site: MatrixSite, config: MoLEConfig, part: str) -> str:
    if config.composition == "output" and site.block_path is None:
        return site.name
    names = {"matrix": site.name, "layer": site.layer, "block": site.block, "network": part}
    return names[config.granularity]


def _matrix_gate(
    slots: list[MatrixSlot], config: MoLEConfig, experts: int, tokens: int | None, part: str
) -> Gate:
    """The gate of a group whose first matrix computes it; token gates have one more for the text stream."""
    streams = {slot.stream for slot in slots}
    leaders = [slots[0]]
    if config.pooling == "token" and streams == {TOKENS, CONTEXT}:
        leaders = [next(slot for slot in slots if slot.stream == stream) for stream in (TOKENS, CONTEXT)]
    side = 0 if config.gate_input == "experts" else 1
    features = [matrix_shape(leader.module)[side] for leader in leaders]
    for leader in leaders:
        leader.leads = config.gate_input == "experts"
    return Gate(config, experts, features[0], features[1] if len(features) > 1 else None, tokens, part)


def _block_width(network: nn.Module, layout: NetworkMap, first: MatrixSite, granularity: str) -> int:
    """Features of a block's or layer's input and output: those that its first matrix reads."""
    for site in layout.sites:
        same = site.block == first.block if granularity == "block" else site.layer == first.layer
        if same and site.block_path is not None and site.stream == TOKENS:
            return matrix_shape(base_layer(network.get_submodule(site.path)))[1]
    raise InjectionError(f"{first.block!r} has no matrix that reads the block's tokens.")


def _count_tokens(
    site: MatrixSite, network: nn.Module, part: str, given: tuple[int, int] | int | None
) -> int:
    """Tokens that a flattened gate on `site` reads."""
    if site.stream == EMBEDDING:
        return 1
    if part != UNET:
        if given is not None and not isinstance(given, int):
            raise ConfigError(f"flatten_tokens={given!r} is not allowed for a text encoder; give one number.")
        return given or CLIP_TOKENS
    if site.stream == CONTEXT:
        return CLIP_TOKENS
    size = given if given is not None else getattr(getattr(network, "config", None), "sample_size", None)
    if isinstance(size, int):
        size = (size, size)
    if not isinstance(size, (tuple, list)):
        raise ConfigError("pooling='flatten' needs the latent's size: pass flatten_tokens=(height, width).")
    height, width = size
    for _ in range(site.depth):
        height, width = (height + 1) // 2, (width + 1) // 2
    return int(height * width)
