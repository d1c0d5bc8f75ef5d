"""The loss of one expert on a CPU: as `network.T5`, with factors that are never multiplied out.

`network.T5` adds every expert's delta to the matrices, so that a step is few large products; its gradients
are then as large as the base. One expert on a CPU is a third faster if its factors stay factors. Norms,
logits and the sums along the layers are in single precision, matrices in that of the products.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .network import buckets
from .shape import Shape
from .weights import Stacks

_MASKED = -1e4
# What reads the same input lies side by side in a stack (`Shape.linears`): (weight, first, how many).
_Matrices = tuple[Tensor, int, int]


class Lone:
    """One expert on a frozen base.

    Args:
        shape: sizes.
        base: its stacks.
        dtype: of the products.
        scaling: of the expert.
    """

    def __init__(self, shape: Shape, base: Stacks, dtype: torch.dtype, scaling: float = 2.0) -> None:
        self._shape, self._dtype, self._scaling = shape, dtype, scaling
        self._shared, self._norms = base["shared"], base["norms"].unbind()
        self._bias = base["bias"].to(dtype)
        stacks = {kind: base[kind].to(dtype) for kind in shape.linears()}

        def side_by_side(kind: str, first: int, count: int) -> _Matrices:
            return stacks[kind][first : first + count].flatten(0, 1).contiguous(), first, count

        encoder, decoder = shape.encoder, shape.decoder
        self._encoder = [
            (side_by_side("square", 4 * k, 3), side_by_side("square", 4 * k + 3, 1)) for k in range(encoder)
        ]
        first = 4 * encoder
        self._decoder = [
            tuple(
                side_by_side("square", first + 6 * k + at, count)
                for at, count in ((0, 3), (3, 1), (4, 1), (5, 1))
            )
            for k in range(decoder)
        ]
        self._readings = side_by_side("square", first + 6 * decoder, 2 * decoder)
        self._feeds = [
            (side_by_side("wide", 2 * k, 2), side_by_side("narrow", k, 1)) for k in range(encoder + decoder)
        ]

    def loss(self, lora: Stacks, sources: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy over the tokens of targets (n, T) after sources (n, L), of the first expert."""
        memory, padding = self._encode(lora, sources)
        logits = self._decode(lora, F.pad(targets[:, :-1], (1, 0)), memory, padding)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=0)

    def _encode(self, lora: Stacks, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(n * L, width) memory, and the mask (n, 1, 1, L) of its padding."""
        rows, length = ids.shape
        padding = (ids == 0)[:, None, None, :].to(self._dtype) * _MASKED
        mask = self._places(0, length, both=True) + padding
        x = F.embedding(ids, self._shared).flatten(0, 1)
        for block, (qkv, out) in enumerate(self._encoder):
            heads = self._heads(self._linear(self._norm(x, 2 * block), qkv, "square", lora), rows, 3)
            x = x + self._linear(self._attend(*heads, mask), out, "square", lora)
            x = x + self._feed(self._norm(x, 2 * block + 1), block, lora)
        return self._norm(x, 2 * self._shape.encoder), padding

    def _decode(self, lora: Stacks, given: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        """(n * T, vocabulary) logits."""
        shape, (rows, length) = self._shape, given.shape
        told = self._heads(self._linear(memory, self._readings, "square", lora), rows, 2 * shape.decoder)
        past = self._places(1, length, both=False)
        past = past + torch.full((length, length), _MASKED, dtype=self._dtype).triu(1)
        x = F.embedding(given, self._shared).flatten(0, 1)
        for block, (qkv, out, asking, read_out) in enumerate(self._decoder):
            norm = 2 * shape.encoder + 1 + 3 * block
            heads = self._heads(self._linear(self._norm(x, norm), qkv, "square", lora), rows, 3)
            x = x + self._linear(self._attend(*heads, past), out, "square", lora)
            (query,) = self._heads(self._linear(self._norm(x, norm + 1), asking, "square", lora), rows, 1)
            read = self._attend(query, told[2 * block], told[2 * block + 1], padding)
            x = x + self._linear(read, read_out, "square", lora)
            x = x + self._feed(self._norm(x, norm + 2), shape.encoder + block, lora)
        x = self._norm(x, len(self._norms) - 1).float() * shape.width**-0.5
        return x @ self._shared.T

    def _linear(self, x: Tensor, matrices: _Matrices, kind: str, lora: Stacks) -> Tensor:
        weight, first, count = matrices
        down, up = (lora[f"{kind}.{side}"][0, first : first + count] for side in "AB")
        found: Tensor = _Adapted.apply(x, weight, down, up, self._scaling)
        return found

    def _norm(self, x: Tensor, number: int) -> Tensor:
        return F.rms_norm(x, (self._shape.width,), self._norms[number], 1e-6).to(self._dtype)

    def _heads(self, x: Tensor, rows: int, count: int) -> tuple[Tensor, ...]:
        shape = self._shape
        return x.view(rows, -1, count, shape.heads, shape.head).permute(2, 0, 3, 1, 4).unbind()

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        # The CPU's own attention is slower on so few tokens, its gradient by far.
        weights = torch.softmax(q @ k.transpose(-1, -2) + mask, -1)
        return (weights @ v).transpose(1, 2).reshape(-1, self._shape.width)

    def _feed(self, x: Tensor, number: int, lora: Stacks) -> Tensor:
        wide, narrow = self._feeds[number]
        gate, value = self._linear(x, wide, "wide", lora).chunk(2, -1)
        return self._linear(F.gelu(gate, approximate="tanh") * value, narrow, "narrow", lora)

    def _places(self, part: int, length: int, *, both: bool) -> Tensor:
        """(1, heads, length, length) added to scores by relative position."""
        return F.embedding(buckets(self._shape, length, length, both=both), self._bias[part]).permute(
            2, 0, 1
        )[None]


class _Adapted(torch.autograd.Function):
    """x W^T and the deltas of k factors whose matrices lie side by side in W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
        first = down.flatten(0, 1).to(x.dtype)
        second = torch.block_diag(*(up * scaling).to(x.dtype))
        inner = x @ first.T
        ctx.save_for_backward(x, weight, first, second, inner)
        ctx.count, ctx.scaling = len(down), scaling
        return torch.addmm(x @ weight.T, inner, second.T)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, first, second, inner = ctx.saved_tensors
        (gradient,) = gradients
        inwards = gradient @ second
        of_x = torch.addmm(gradient @ weight, inwards, first) if ctx.needs_input_grad[0] else None
        of_down = (inwards.T @ x).float().unflatten(0, (ctx.count, -1))
        parts = zip(gradient.chunk(ctx.count, 1), inner.chunk(ctx.count, 1), strict=True)
        of_up = torch.stack([outer.T @ own for outer, own in parts]).float() * ctx.scaling
        return of_x, None, of_down, of_up, None
