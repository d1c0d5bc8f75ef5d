"""Forward hooks: one per matrix (mixed delta), one per network; those of blocks are in `block_hook`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from . import functional
from .context import ForwardContext, TokenShares
from .errors import InjectionError
from .gates import Gate
from .groups import BASE, Group
from .matrices import Bundle, MatrixPlan, MatrixSlot, output_tokens
from .modules import network_device
from .networks.base import CONTEXT, EMBEDDING, JOINT, TOKENS, Architecture, streams_of
from .routing import KEYS
from .torch_state import (
    as_type,
    has_compiled_parts,
    in_backward,
    is_compiling,
    on_device,
    without_autocast,
)
from .values import Expanded, GateValue, Voice


def mixing_weights(
    value: GateValue, context: ForwardContext, stream: str, tokens: int, *, scaled: bool = True
) -> Tensor:
    """Weights (B, 1 or L, N) with strength, region masks and, if `scaled`, the experts' scales applied."""
    activation = context.activation
    weights = value.weights
    count: Tensor | float = float(len(activation.active))
    if activation.regions is not None and stream == TOKENS:
        masks = context.region_masks(activation.regions, tokens, weights.device)
        if activation.fixed is None:
            weights = functional.region_weights(weights, masks)
            count = functional.region_counts(masks)
        else:
            weights = weights * masks
    if value.strength is not None:
        strength = value.strength
        if strength.dim() > 0:
            strength = strength.view(value.batch, -1, 1)
        weights = weights * functional.effective_strength(strength, count, context.experts)
    if scaled and activation.scales is not None:
        weights = weights * on_device(activation.scales, weights.device)
    return weights


def rank_weights(value: GateValue, gate: Gate, plan: MatrixPlan, context: ForwardContext) -> Tensor:
    """Weight of each rank of a matrix, without region masks, float32.

    Returns:
        (B * T, R), a row for each row of `value`.
    """
    scales, active = context.activation.scales, len(context.activation.active)
    if value.strength is not None and value.strength.dim() == 0:
        return value.rows.mm(gate.shares(plan, active, scales))
    rows = value.rows
    if value.strength is not None:
        rows = rows * functional.effective_strength(value.strength, float(active), context.experts)
    if scales is not None:
        rows = rows * scales
    return rows.mm(plan.owners)


def joint_weights(
    values: Sequence[GateValue], context: ForwardContext, tokens: int, *, scaled: bool = True
) -> Tensor:
    """As `mixing_weights`, (B, L, N) for a sequence that holds image and text tokens.

    Args:
        values: what the gates of the image and of the text tokens said.
        context: state of the mixture.
        tokens: L.
        scaled: whether to apply the experts' scales.
    """
    pieces = []
    for stream, value in zip((TOKENS, CONTEXT), values, strict=True):
        span = context.span(stream, tokens)
        length = span.stop - span.start
        weights = mixing_weights(value, context, stream, length, scaled=scaled)
        pieces.append((span.start, weights.expand(weights.shape[0], length, -1)))
    return torch.cat([weights for _, weights in sorted(pieces, key=lambda piece: piece[0])], dim=1)


class MatrixHook:
    """Forward hook of one matrix: output + mixed delta.

    Args:
        slot: the matrix.
        group: its group.
        bundle: the matrices that read the same tensor.
        context: state of the mixture.
        reading: those of the matrix that the group's gate reads the context through, if any.
    """

    def __init__(
        self,
        slot: MatrixSlot,
        group: Group,
        bundle: Bundle,
        context: ForwardContext,
        reading: Bundle | None = None,
    ) -> None:
        self.slot = slot
        self.group = group
        self.bundle = bundle
        self.context = context
        self._reading = reading
        # What the tokens are, the gate's voice, and the matrix it is read off if it is computed here.
        self._gates = tuple(
            (stream, group.voice(stream), group.leader(stream) if group.first(stream) is slot else None)
            for stream in streams_of(slot.stream)
        )

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """See `torch.nn.Module.register_forward_hook`; None leaves the output as it is."""
        if not self.context.enabled:
            return None
        pictures = self.context.forward.pictures
        if (self.slot.folds or output.dim() > 4) and pictures:
            folded = self.bundle.fold(args[0], pictures)
            mixed = self._mixed(folded, output.reshape(pictures, -1, output.shape[-1]))
            return None if mixed is None else mixed.view(output.shape)
        within = self.context.forward.within if self.slot.amid else None
        if within is not None:
            mixed = self._mixed(args[0][:, within], output[:, within])
            around = output[:, : within.start], output[:, within.stop :]
            return None if mixed is None else torch.cat([around[0], mixed, around[1]], dim=1)
        lengths = self.context.forward.packed.get(self.slot.stream)
        if lengths is None or output.dim() != 2:
            return self._mixed(args[0], output)
        # The pictures one by one, as gates know them.
        x, parted = (pad_sequence(one.split(list(lengths)), batch_first=True) for one in (args[0], output))
        mixed = self._mixed(x, parted)
        if mixed is None:
            return None
        return torch.cat([own[:length] for own, length in zip(mixed, lengths, strict=True)])

    def _mixed(self, x: Tensor, output: Tensor) -> Tensor | None:
        """The output with the mixed delta; None where there is none.

        Args:
            x: (B, L, in) input, an image (B, in, H, W) or rows (B, in).
            output: the module's own.
        """
        slot, device, dtype = self.slot, output.device, output.dtype
        if self.group.block is not None and self.context.activation.gated:
            return self._solo(x, output)
        with without_autocast(device):
            plan = slot.plan(self.context.layouts, device, dtype)
            if self.context.activation.route is not None:
                return self._routed(plan, x, output)
            values = [self._gate(stream, voice, leader, x, output) for stream, voice, leader in self._gates]
            z = self.bundle.project(slot, x, device, dtype) if slot.read else None
            if plan.up is None or z is None:
                return None
            if plan.columns is not None:
                z = z.index_select(-1, plan.columns)
            weights = self._rank_weights(values, plan, dtype, z.shape[0], z.shape[0] // x.shape[0])
            if weights.dim() == 3:
                z = z.view(x.shape[0], -1, z.shape[-1])
            return functional.add_mixed_delta(output, z, weights, plan.up, slot.rows)

    def _routed(self, plan: MatrixPlan, x: Tensor, output: Tensor) -> Tensor | None:
        """The matrix weighs the experts by itself."""
        slot, context, device, dtype = self.slot, self.context, output.device, output.dtype
        route = context.activation.route
        if plan.up is None or route is None:
            return None
        z = self.bundle.project(slot, x, device, dtype)
        if plan.columns is not None:
            z = z.index_select(-1, plan.columns)
        if route.kind == KEYS:
            rows = output_tokens(slot.module, x).flatten(0, -2)
            weights = route.keyed(slot.name, as_type(rows, torch.float32), plan.owners)
        else:
            factors, rows = slot.route_factors(route, device), as_type(z, torch.float32)
            weights = route.weights(factors, rows, plan.owners, context.forward.timestep)
        if context.activation.scales is not None:
            weights = weights * on_device(context.activation.scales, device)
        return functional.add_mixed_delta(
            output, z, as_type(weights @ plan.owners, dtype), plan.up, slot.rows
        )

    def _gate(
        self, stream: str, voice: Voice, leader: MatrixSlot | None, x: Tensor, output: Tensor
    ) -> GateValue:
        """The gate of tokens of a stream: computed here if this is its first matrix, else looked up."""
        context, activation = self.context, self.context.activation
        if activation.fixed is not None:
            return context.fixed(x.device)
        if activation.shares is not None:
            return self._share(activation.shares, stream, voice, output)
        if self.group.pooled and voice.value is None:
            return self._pooled(voice, output)
        if leader is None or self.group.pooled:
            return context.fetch(voice, self.slot.name)
        logits = real = None
        if len(activation.active) > 1 and not self.group.gate.indifferent:
            logits, real = self._logits(stream, leader, x, output)
        return self.group.evaluate(logits, x, context, stream, real)

    def _share(self, shares: TokenShares, stream: str, voice: Voice, output: Tensor) -> GateValue:
        """The weights of the tokens of a stream in the matrix' output."""
        context = self.context
        rows = output.shape[2:].numel() if output.dim() == 4 else output.shape[1:-1].numel()
        if stream != EMBEDDING and self.slot.stream == JOINT:
            span = context.span(stream, rows)
            rows = span.stop - span.start
        # Where it does not matter, equal blocks that are compiled one by one have one graph.
        place = self.group.place(stream) if shares.by_place else ""
        value = shares.value(context, stream, rows, place)
        return value if voice.value is not None else context.store(voice, value)

    def _logits(
        self, stream: str, leader: MatrixSlot, x: Tensor, output: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The gate's logits, and the share of each token in means where there is padding."""
        context, gate = self.context, self.group.gate
        hidden = gate.config.gate_input == "hidden"
        if hidden:
            features = output_tokens(leader.module, x)
        else:
            features = self.bundle.peek(leader, x, output.device, output.dtype)
        real = None
        # Token by token it does not matter which rows are neighbours.
        if gate.config.pooling != "token" or self.slot.stream == JOINT or context.forward.masks:
            features = features.view(x.shape[0], -1, features.shape[-1])
            if self.slot.stream == JOINT:
                features = features[:, context.span(stream, features.shape[1])]
            real = context.real_tokens(stream, features, folded=self.slot.folds)
        features = as_type(features, torch.float32)
        if hidden:
            return gate.feature_logits(features, stream, real), real
        factors = leader.gate_factors(context.experts, features.device)
        return gate.rank_logits(features, factors, stream, real), real

    def _pooled(self, voice: Voice, output: Tensor) -> GateValue:
        """The gate for all tokens of a causal network, from its context: the same in all steps."""
        context, gate, memory = self.context, self.group.gate, self.context.forward.memory
        if memory is None:
            raise InjectionError(
                f"The gate {voice.label!r} of the {context.part} is pooled over what the model reads, and it "
                "was run without."
            )
        versions = [parameter._version for parameter in gate.parameters()]
        kept = context.pooled(voice.label, versions)
        if kept is not None:
            return context.store(voice, kept)
        logits, real = None, None
        if len(context.activation.active) > 1:
            real = context.real_tokens(CONTEXT, memory)
            reader = self.group.reader
            if reader is None or self._reading is None:
                logits = gate.feature_logits(as_type(memory, torch.float32), CONTEXT, real)
            else:
                z = self._reading.peek(reader, memory, output.device, output.dtype)
                z = as_type(z.view(*memory.shape[:2], -1), torch.float32)
                logits = gate.rank_logits(z, reader.gate_factors(context.experts, z.device), CONTEXT, real)
        value = self.group.evaluate(logits, memory, context, CONTEXT, real)
        context.keep_pooled(voice.label, versions, value)
        return value

    def _rank_weights(
        self, values: list[GateValue], plan: MatrixPlan, dtype: torch.dtype, rows: int, tokens: int
    ) -> Tensor:
        """Weight of each rank, shared by all matrices of the group with the same layout.

        Args:
            values: of the gates of the matrix.
            plan: of the matrix.
            dtype: of the weights.
            rows, tokens: B * L and L.
        Returns:
            What broadcasts to (B * L, R) or, of three dimensions, to (B, L, R).
        """
        context, stream = self.context, self.slot.stream
        value, activation = values[0], context.activation
        joint = stream == JOINT and (activation.fixed is None or activation.regions is not None)
        regions = activation.regions is not None and stream == TOKENS
        if stream == EMBEDDING and value.tokens > 1:
            # One row for the whole picture, in a group whose gate speaks for every token.
            value = value.pooled()
        if not joint:
            self._check_tokens(value, tokens)
        key = (plan.layout, dtype, tokens if regions or joint else 0)
        expanded: Expanded = value.expanded_with(values[1]) if joint else value.expanded
        if joint and torch.is_grad_enabled() and any(one.rows.requires_grad for one in values):
            # A checkpoint that recomputes this matrix and not its gate must save the same tensors again.
            expanded = {}
        # A recomputation (checkpointing) must save what the forward saved: the same matrix does it again.
        known = expanded.get(key)
        if known is None or (in_backward() and known[1] is self.slot and not value.in_backward):
            if joint:
                for (kind, *_), one in zip(self._gates, values, strict=True):
                    span = context.span(kind, tokens)
                    self._check_tokens(one, span.stop - span.start)
                weights = joint_weights(values, context, tokens) @ plan.owners
            elif regions:
                weights = mixing_weights(value, context, stream, tokens) @ plan.owners
            else:
                weights = rank_weights(value, self.group.gate, plan, context)
            weights = as_type(weights, dtype)
            if known is None:
                expanded[key] = weights, self.slot
        else:
            weights = known[0]
        # Not "in (1, rows)": torch.compile of 2.8 cannot tell for sizes that vary.
        if weights.dim() == 2 and weights.shape[0] != 1 and weights.shape[0] != rows:
            weights = weights.view(value.batch, -1, weights.shape[-1])
        return weights

    def _check_tokens(self, value: GateValue, tokens: int) -> None:
        if value.tokens != 1 and value.tokens != tokens:
            raise InjectionError(
                f"{self.slot.name!r} has {tokens} tokens and its gate {value.tokens}: a gate per "
                "token needs the same tokens in the whole group; use pooling='mean' where tokens are merged."
            )

    def _solo(self, x: Tensor, output: Tensor) -> Tensor | None:
        """Inside a block that runs once per expert: that expert's delta alone."""
        solo, slot, device, dtype = self.group.solo, self.slot, output.device, output.dtype
        if solo is None or solo == BASE or solo not in slot.factors:
            return None
        z = self.bundle.alone(slot, solo, x, device, dtype)
        scales = self.context.activation.scales
        if scales is not None:
            z = z * scales[solo].to(device, dtype)
        return functional.add_delta(output, z, slot.up((solo,), device, dtype), slot.rows)


class NetworkHook:
    """Pre-hook of the whole network: a new forward begins.

    Args:
        context: state of the mixture.
        groups, bundles: what to clean after an interrupted forward.
        architecture: what the network is.
        follow: called first; lets the hooks follow a network that runs other modules than before.
    """

    def __init__(
        self,
        context: ForwardContext,
        groups: list[Group],
        bundles: list[Bundle],
        architecture: Architecture,
        follow: Callable[[], None],
    ) -> None:
        self.context = context
        self.groups = [group for group in groups if group.block is not None]
        self.timed = next((one.gate for one in groups if one.gate.timestep_projection is not None), None)
        self.bundles = bundles
        self.architecture = architecture
        self.follow = follow

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See `torch.nn.Module.register_forward_pre_hook`."""
        self.follow()
        self.context.begin(self.architecture.forward(args, kwargs, self.context.given_size))
        for group in self.groups:
            group.solo = None
        prepare = self.context.chosen and not is_compiling()
        compiled_on = network_device(module) if prepare and has_compiled_parts(module) else None
        for bundle in self.bundles:
            bundle.clear()
            if prepare:
                # Blocks that are compiled alone find ready what they must not make themselves.
                bundle.prepare(self.context.layouts, self.context.experts, compiled_on)
        timed = self.timed
        if timed is not None and self.context.activation.gated and self.context.forward.timestep is not None:
            self.context.time_features(timed.projection.device)
        if prepare:
            self.context.chosen = False
