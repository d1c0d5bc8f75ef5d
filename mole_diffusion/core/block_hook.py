"""Hooks of blocks in composition "output": each runs once per expert, and what it returns is mixed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .context import ForwardContext
from .errors import InjectionError
from .groups import BASE, Group
from .hooks import joint_weights, mixing_weights
from .networks.base import JOINT, streams_of
from .torch_state import without_autocast
from .values import GateValue


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
        return self.context.enabled and self.context.activation.gated

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the inputs (some hosts change theirs in place) and let the base run alone."""
        if not self._applies() or self.group.solo is not None:
            return
        if self.context.forward.keeps:
            raise InjectionError(
                f"composition='output' runs {self.group.name!r} once per expert, and the "
                f"{self.context.part} keeps what its blocks computed for steps to come: run it "
                "with use_cache=False, or use composition='delta'."
            )
        copied = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
        self._inputs = copied, {k: v.clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        self.group.solo = BASE

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Base output + s * sum_i g_i (output with expert i - base output)."""
        if not self._applies() or self.group.solo != BASE:
            return output
        try:
            bases = self._returned(output)
            deltas = self._deltas(module, bases)
        finally:
            inputs, self._inputs = self._inputs, ((), {})
            self.group.solo = None
        # Gates of blocks that return several tensors read none of them.
        first = next(iter(bases.values()))
        hidden = inputs[0][0] if inputs[0] else inputs[1].get("hidden_states", first)
        with without_autocast(first.device):
            mixed = {
                stream: self._mixed(stream, base, {i: own[stream] for i, own in deltas.items()}, hidden)
                for stream, base in bases.items()
            }
        if isinstance(output, Tensor):
            return mixed[self.group.returns[0]]
        returns = self.group.returns
        return (*(mixed.get(stream) for stream in returns), *output[len(returns) :])

    def _mixed(self, stream: str, base: Tensor, deltas: dict[int, Tensor], hidden: Tensor) -> Tensor:
        """One of the returned tensors (B, L, d); `deltas` are what each expert adds to it alone."""
        values = [self._value(kind, stream, deltas, hidden, base) for kind in streams_of(stream)]
        # The experts' scales are inside the block outputs already.
        tokens = base.shape[1]
        if stream == JOINT:
            weights = joint_weights(values, self.context, tokens, scaled=False)
        else:
            weights = mixing_weights(values[0], self.context, stream, tokens, scaled=False)
        active = self.context.activation.active
        return base + sum(weights[..., i : i + 1].to(base.dtype) * deltas[i] for i in active)

    def _deltas(self, module: nn.Module, bases: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
        """Expert index -> stream -> (B, L, d); of all experts if the gate reads them."""
        activation = self.context.activation
        reads_all = self.group.gate.config.gate_input != "hidden" and len(activation.active) > 1
        args, kwargs = self._inputs
        deltas = {}
        for i in range(self.context.experts) if reads_all else activation.active:
            self.group.solo = i
            fresh = (a.clone() if isinstance(a, Tensor) else a for a in args)
            named = {k: v.clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
            # Not module(...): hooks of others on the block, such as those by which transformers 5 collects
            # hidden states, are to see the mixed output, once.
            found = self._returned(module.forward(*fresh, **named))
            deltas[i] = {stream: found[stream] - base for stream, base in bases.items()}
        return deltas

    def _value(
        self, kind: str, stream: str, deltas: dict[int, Tensor], hidden: Tensor, base: Tensor
    ) -> GateValue:
        """What the gate says for the tokens of a kind in a returned tensor."""
        context, gate = self.context, self.group.gate
        logits = real = None
        if len(context.activation.active) > 1:
            if gate.config.gate_input == "hidden":
                features = hidden.float()
            else:
                features = torch.stack([deltas[i].float() for i in range(context.experts)], dim=2)
            if stream == JOINT:
                features = features[:, context.span(kind, features.shape[1])]
            real = context.real_tokens(kind, features)
            logits = gate.feature_logits(features, kind, real)
        return self.group.evaluate(logits, base, context, kind, real)

    def _returned(self, output: Any) -> dict[str, Tensor]:
        """The tensors by stream among what a block returns (older libraries return tuples).

        The last block for a stream returns None of it.
        """
        returned = [output] if isinstance(output, Tensor) else list(output)[: len(self.group.returns)]
        found = dict(zip(self.group.returns, returned, strict=True))
        kept = {stream: one for stream, one in found.items() if one is not None or len(found) == 1}
        for one in kept.values():
            if not isinstance(one, Tensor):
                raise InjectionError(f"A block returned {type(one).__name__}; expected a tensor or a tuple.")
        return kept
