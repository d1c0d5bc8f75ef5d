"""`Gate`: the trainable part. The mathematics is in `functional`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .caches import ParameterCache
from .config import MoLEConfig
from .errors import InjectionError
from .matrices import MatrixPlan
from .networks.base import CONTEXT, DENOISER, ENCODER, Role
from .ranks import GateFactors
from .torch_state import is_compiling, on_device


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
        prior: (N,) added to the logits over tau, see `begin_with`; None for zeros.
        log_temperature: log tau.
        strength: factor of the mixed delta.
    """

    projection: nn.Parameter
    context_projection: nn.Parameter | None
    timestep_projection: nn.Parameter | None
    prior: Tensor | None
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
        self.register_buffer("prior", None)
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

    def begin_with(self, weights: Tensor) -> None:
        """Weigh the experts so until the gate learns more, by what is added to its logits.

        Args:
            weights: (N,) above 0, below 1, summing to 1.
        """
        wanted = weights.detach().float().to(self.projection.device)
        if self.config.gate_function == "sigmoid":
            wanted = wanted / (1 - wanted) * (self.experts - 1) / self.experts
        self.prior = torch.log(wanted * self.experts)

    @property
    def begun_with(self) -> Tensor | None:
        """(N,) the weights of `begin_with`; None where there were none."""
        if self.prior is None:
            return None
        odds = torch.exp(self.prior)
        sigmoid = self.config.gate_function == "sigmoid"
        return odds / (odds + self.experts - 1) if sigmoid else odds / self.experts

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """As PyTorch's; a state without a prior is that of a gate without one."""
        found = state_dict.get(f"{prefix}prior")
        self.prior = None if found is None else torch.zeros_like(found, device=self.projection.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

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
        if self.prior is not None:
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
