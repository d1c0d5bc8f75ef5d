"""Forward hooks: one per matrix (mixed delta), one per block (composition "output"), one per network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .architectures import EMBEDDING, TOKENS
from .context import ForwardContext, GateValue, in_backward, without_autocast
from .errors import InjectionError
from .gates import BASE, Group
from .matrices import Bundle, MatrixSlot, output_tokens, rank_activations


def mixing_weights(
    value: GateValue, context: ForwardContext, stream: str, tokens: int, *, scaled: bool = True
) -> Tensor:
    """Weights (B, 1 or L, N) with strength, region masks and, if `scaled`, the experts' scales applied."""
    activation = context.activation
    weights = value.weights
    count: Tensor | float = float(len(activation.active))
    if activation.regions is not None and stream == TOKENS:
        masks = activation.regions.on_grid(*context.token_grid(tokens), weights.device)
        if activation.fixed is None:
            weights = functional.region_weights(weights, masks)
            count = functional.region_counts(masks)
        else:
            weights = weights * masks
    if value.strength is not None:
        weights = weights * functional.effective_strength(value.strength, count, context.experts)
    if scaled and any(scale != 1.0 for scale in activation.scales):
        weights = weights * torch.tensor(activation.scales, device=weights.device)
    return weights


class MatrixHook:
    """Forward hook of one matrix: output + mixed delta.

    Args:
        slot: the matrix.
        group: its group.
        bundle: the matrices that read the same tensor.
        context: state of the mixture.
    """

    def __init__(self, slot: MatrixSlot, group: Group, bundle: Bundle, context: ForwardContext) -> None:
        self.slot = slot
        self.group = group
        self.bundle = bundle
        self.context = context

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """See `torch.nn.Module.register_forward_hook`; None leaves the output as it is."""
        if not self.context.enabled:
            return None
        x: Tensor = args[0]
        if self.group.block is not None and self.context.activation.fixed is None:
            return self._solo(x, output)
        activation = self.context.activation
        experts = self.slot.mixed(activation.active)
        projected = self.slot.projected(activation)
        with without_autocast(output.device):
            z = self.bundle.project(self.slot, x, output, activation) if projected else None
            value = self._gate(x, z)
            if not experts or z is None:
                return None
            if experts != projected:
                z = z.index_select(-1, self.slot.columns(projected, experts, z.device))
            weights = self._rank_weights(value, experts, output, tokens=z.shape[1])
            return self._add(output, z, weights, experts)

    def _add(self, output: Tensor, z: Tensor, weights: Tensor, experts: tuple[int, ...]) -> Tensor:
        rows = output.unsqueeze(1) if output.dim() == 2 else output
        return functional.add_mixed_delta(rows, z, weights, self.slot.up(experts, output)).view(output.shape)

    def _gate(self, x: Tensor, z: Tensor | None) -> GateValue:
        """The group's gate: computed here if this is its first matrix, else looked up."""
        context, group, slot = self.context, self.group, self.slot
        label = group.label(slot.stream)
        if context.activation.fixed is not None:
            weights = torch.tensor(context.activation.fixed, device=x.device).view(1, 1, -1)
            return context.values.get(label) or context.store(
                label, GateValue(weights, None, in_backward()), trained=False
            )
        if group.leader(slot.stream) is not slot:
            return context.fetch(label, slot.name)
        logits = None
        if len(context.activation.active) > 1:
            if group.gate.config.gate_input == "hidden" or z is None:
                logits = group.gate.feature_logits(output_tokens(slot.module, x).float(), slot.stream)
            else:
                logits = group.gate.rank_logits(z.float(), *slot.gate_factors(z.device), slot.stream)
        return group.evaluate(logits, x, context, slot.stream)

    def _rank_weights(
        self, value: GateValue, experts: tuple[int, ...], output: Tensor, tokens: int
    ) -> Tensor:
        """(B, 1 or L, R) weight of each rank, shared by all matrices of the group with the same layout."""
        context, stream = self.context, self.slot.stream
        layout = self.slot.layout(experts)
        if stream == EMBEDDING and value.weights.shape[1] > 1:
            # One row for the whole picture, in a group whose gate speaks for every token.
            value = value.pooled()
        per_token = value.weights.shape[1] > 1
        if per_token and value.weights.shape[1] != tokens:
            raise InjectionError(
                f"{self.slot.name!r} has {tokens} tokens and its gate {value.weights.shape[1]}: a gate per "
                "token needs the same tokens in the whole group; use pooling='mean' where tokens are merged."
            )
        regions = context.activation.regions is not None and stream == TOKENS
        key = (layout, output.dtype, tokens if regions else 0)
        if key not in value.expanded:
            weights = mixing_weights(value, context, stream, tokens).to(output.dtype)
            value.expanded[key] = weights @ self.slot.owners(experts, context.experts, output)
        return value.expanded[key]

    def _solo(self, x: Tensor, output: Tensor) -> Tensor | None:
        """Inside a block that runs once per expert: that expert's delta alone."""
        solo = self.group.solo
        if solo is None or solo == BASE or solo not in self.slot.factors:
            return None
        experts = (solo,)
        down, offset = self.slot.cache.get(
            ("down", experts, output.device, output.dtype),
            lambda: tuple(t.to(output.device, output.dtype) for t in self.slot.down(experts)),
        )
        z = rank_activations(self.slot.module, x, down, offset)
        scale = torch.full((1, 1, 1), self.context.activation.scales[solo], device=z.device, dtype=z.dtype)
        return self._add(output, z, scale, experts)


class BlockHook:
    """Hooks of a block in composition "output": run it once per expert and mix what it returns (Eq. 5-13).

    Args:
        group: the group whose module is hooked.
        context: state of the mixture.
    """

    def __init__(self, group: Group, context: ForwardContext) -> None:
        self.group = group
        self.context = context
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def _applies(self) -> bool:
        return self.context.enabled and self.context.activation.fixed is None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the inputs (some hosts change theirs in place) and let the base run alone."""
        if not self._applies() or self.group.solo is not None:
            return
        copied = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
        self._inputs = copied, {k: v.clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        self.group.solo = BASE

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Base output + s * sum_i g_i (output with expert i - base output)."""
        if not self._applies() or self.group.solo != BASE:
            return output
        try:
            base = _primary(output)
            deltas = self._deltas(module, base)
        finally:
            inputs, self._inputs = self._inputs, ((), {})
            self.group.solo = None
        hidden = inputs[0][0] if inputs[0] else inputs[1]["hidden_states"]
        with without_autocast(base.device):
            value = self.group.evaluate(self._logits(deltas, hidden), base, self.context, TOKENS)
            # The experts' scales are inside the block outputs already.
            weights = mixing_weights(value, self.context, TOKENS, base.shape[1], scaled=False)
            active = self.context.activation.active
            mixed = base + sum(weights[..., i : i + 1].to(base.dtype) * deltas[i] for i in active)
        return mixed if isinstance(output, Tensor) else (mixed, *output[1:])

    def _deltas(self, module: nn.Module, base: Tensor) -> dict[int, Tensor]:
        """Expert index -> (B, L, d); of all experts if the gate reads them, else of the active ones."""
        activation = self.context.activation
        reads_all = self.group.gate.config.gate_input == "experts" and len(activation.active) > 1
        args, kwargs = self._inputs
        deltas = {}
        for i in range(self.context.experts) if reads_all else activation.active:
            self.group.solo = i
            fresh = (a.clone() if isinstance(a, Tensor) else a for a in args)
            named = {k: v.clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
            # Not module(...): hooks of others on the block, such as those by which transformers 5 collects
            # hidden states, are to see the mixed output, once.
            deltas[i] = _primary(module.forward(*fresh, **named)) - base
        return deltas

    def _logits(self, deltas: dict[int, Tensor], hidden: Tensor) -> Tensor | None:
        if len(self.context.activation.active) == 1:
            return None
        if self.group.gate.config.gate_input == "hidden":
            return self.group.gate.feature_logits(hidden.float(), TOKENS)
        features = torch.stack([deltas[i].float() for i in range(self.context.experts)], dim=2)
        return self.group.gate.feature_logits(features, TOKENS)


def _primary(output: Any) -> Tensor:
    """The hidden states among what a block returns (older libraries return tuples)."""
    primary = output if isinstance(output, Tensor) else output[0]
    if not isinstance(primary, Tensor):
        raise InjectionError(f"A block returned {type(output).__name__}; expected a tensor or a tuple.")
    return primary


class NetworkHook:
    """Pre-hook of the whole network: a new forward begins.

    Args:
        context: state of the mixture.
        groups, bundles: what to clean after an interrupted forward.
        spatial: whether the inputs are a latent (B, C, H, W) and its timestep.
    """

    def __init__(
        self, context: ForwardContext, groups: list[Group], bundles: list[Bundle], *, spatial: bool
    ) -> None:
        self.context = context
        self.groups = groups
        self.bundles = bundles
        self.spatial = spatial

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See `torch.nn.Module.register_forward_pre_hook`."""
        latent = args[0] if args else kwargs.get("sample", kwargs.get("x"))
        size = timestep = None
        if self.spatial:
            timestep = args[1] if len(args) > 1 else kwargs.get("timestep", kwargs.get("timesteps"))
        if self.spatial and isinstance(latent, Tensor) and latent.dim() == 4:
            size = (latent.shape[-2], latent.shape[-1])
        self.context.begin(size, timestep)
        for group in self.groups:
            if group.block is not None:
                group.solo = None
        for bundle in self.bundles:
            bundle.clear()
