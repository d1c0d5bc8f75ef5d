"""T5 as functions of its weights, made for speed: few large products, half precision, little padding.

Its parameters come stacked (`weights`). Rows of different lengths come in buckets: linear maps and norms see
the tokens of all of them at once, attention each bucket by itself. Nothing here waits for the device, so that
a whole training step can be a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .shape import Shape
from .weights import Stacks

#: (sources (G * rows, L), targets (G * rows, T)) of each bucket; G is the number of experts, or 1.
Batch = Sequence[tuple[Tensor, Tensor]]
_MASKED = -1e4
_KINDS = ("square", "wide", "narrow")


def buckets(shape: Shape, queries: int, keys: int, *, both: bool) -> Tensor:
    """(queries, keys) number of the relative position, as transformers counts them."""
    relative = torch.arange(keys)[None] - torch.arange(queries)[:, None]
    count, base = shape.buckets, torch.zeros(queries, keys, dtype=torch.long)
    if both:
        count //= 2
        base = (relative > 0).long() * count
        relative = relative.abs()
    else:
        relative = -relative.clamp_max(0)
    exact = count // 2
    far = relative.clamp_min(1).float() / exact
    far = exact + (torch.log(far) / math.log(shape.distance / exact) * (count - exact)).long()
    return base + torch.where(relative < exact, relative, far.clamp_max(count - 1))


@dataclass(frozen=True)
class _Weights:
    """What one forward reads: matrices by use, in the precision of products; (out, in) or (G, out, in)."""

    shared: Tensor
    encoder: list[tuple[Tensor, Tensor]]
    decoder: list[tuple[Tensor, Tensor, Tensor, Tensor]]
    readings: Tensor
    feeds: list[tuple[Tensor, Tensor]]
    norms: tuple[Tensor, ...]
    bias: Tensor


class T5:
    """A T5's forward on given weights.

    Args:
        shape: its sizes.
        source, target: tokens of the longest source and target.
        device: where it runs.
        dtype: of everything but the last softmax.
        scaling: of experts.
    """

    def __init__(
        self,
        shape: Shape,
        source: int,
        target: int,
        device: torch.device,
        dtype: torch.dtype,
        scaling: float = 2.0,
    ) -> None:
        self.shape, self.dtype, self.scaling = shape, dtype, scaling
        # Products with ones in place of look-ups: their gradient is a product too, and needs no sorting.
        self._both = F.one_hot(buckets(shape, source, source, both=True), shape.buckets).to(device, dtype)
        self._past = F.one_hot(buckets(shape, target, target, both=False), shape.buckets).to(device, dtype)
        self._tokens = torch.arange(shape.vocabulary, device=device)
        self._causal = torch.full((target, target), _MASKED, device=device, dtype=dtype).triu(1)

    def loss(self, stacks: Stacks, lora: Stacks | None, batch: Batch) -> Tensor:
        """Mean cross entropy over the tokens of all buckets; the sum of the experts' means with experts."""
        groups = _groups(lora)
        weights = self._weights(stacks, lora)
        memory = self._encode(weights, [ids for ids, _ in batch], groups)
        given = [F.pad(targets[:, :-1], (1, 0)) for _, targets in batch]
        logits = self._decode(weights, given, memory, [ids for ids, _ in batch], groups)
        targets = torch.cat([targets.reshape(groups, -1) for _, targets in batch], 1)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        real = (targets != 0).float()
        return ((losses.view(real.shape) * real).sum(1) / real.sum(1)).sum()

    @torch.no_grad()
    def greedy(self, stacks: Stacks, lora: Stacks | None, ids: Tensor, length: int) -> Tensor:
        """(G * rows, length) most likely tokens after sources (G * rows, L)."""
        groups = _groups(lora)
        weights = self._weights(stacks, lora)
        memory = self._encode(weights, [ids], groups)
        given = torch.zeros(len(ids), 1, dtype=torch.long, device=ids.device)
        for _ in range(length):
            logits = self._decode(weights, [given], memory, [ids], groups)
            following = logits.view(len(ids), given.shape[1], -1)[:, -1].argmax(-1, keepdim=True)
            given = torch.cat([given, following], 1)
        return given[:, 1:]

    def _weights(self, stacks: Stacks, lora: Stacks | None) -> _Weights:
        encoder, decoder = self.shape.encoder, self.shape.decoder
        square, wide, narrow = (self._matrices(stacks, lora, kind) for kind in _KINDS)
        # The matrices of a stack by use; see `Shape.linears`.
        parts = _parts(square, [3, 1] * encoder + [3, 1, 1, 1] * decoder + [2 * decoder])
        self_attention = [(parts[2 * k], parts[2 * k + 1]) for k in range(encoder)]
        rest = parts[2 * encoder :]
        feeds = list(
            zip(
                _parts(wide, [2] * (encoder + decoder)),
                _parts(narrow, [1] * (encoder + decoder)),
                strict=True,
            )
        )
        return _Weights(
            shared=stacks["shared"].to(self.dtype),
            encoder=self_attention,
            decoder=[
                (rest[4 * k], rest[4 * k + 1], rest[4 * k + 2], rest[4 * k + 3]) for k in range(decoder)
            ],
            readings=rest[-1],
            feeds=feeds,
            norms=stacks["norms"].to(self.dtype).unbind(),
            bias=stacks["bias"].to(self.dtype),
        )

    def _matrices(self, stacks: Stacks, lora: Stacks | None, kind: str) -> Tensor:
        """(matrices, out, in), or (experts, matrices, out, in) with each expert's delta added."""
        matrices = stacks[kind].to(self.dtype)
        if lora is None:
            return matrices
        up, down = (lora[f"{kind}.{side}"].to(self.dtype) for side in "BA")
        return torch.add(matrices, up @ down, alpha=self.scaling)

    def _encode(self, weights: _Weights, ids: Sequence[Tensor], groups: int) -> Tensor:
        """(G, N, width) of the N tokens of all sources of a group."""
        x = self._embedded(weights, ids, groups)
        masks = [
            self._bias(weights.bias[0], self._both[: one.shape[1], : one.shape[1]]) + self._padding(one)
            for one in ids
        ]
        for block, (qkv, out) in enumerate(weights.encoder):
            heads = _linear(self._norm(x, weights.norms[2 * block]), qkv)
            x = x + self._attend(self._heads(heads, ids, 3), masks, out, groups)
            x = x + self._feed(self._norm(x, weights.norms[2 * block + 1]), weights.feeds[block])
        return self._norm(x, weights.norms[2 * self.shape.encoder])

    def _decode(
        self,
        weights: _Weights,
        given: Sequence[Tensor],
        memory: Tensor,
        ids: Sequence[Tensor],
        groups: int,
    ) -> Tensor:
        """(G, M, vocabulary) logits after the M tokens of all `given` of a group; `memory` is of `ids`."""
        x = self._embedded(weights, given, groups)
        lengths = [one.shape[1] for one in given]
        pasts = [
            self._bias(weights.bias[1], self._past[:length, :length]) + self._causal[:length, :length]
            for length in lengths
        ]
        padding = [
            self._padding(one).expand(-1, self.shape.heads, length, -1)
            for one, length in zip(ids, lengths, strict=True)
        ]
        readings = self._heads(_linear(memory, weights.readings), ids, 2 * self.shape.decoder)
        for block, (qkv, out, query, read_out) in enumerate(weights.decoder):
            norms = weights.norms[2 * self.shape.encoder + 1 + 3 * block :]
            heads = _linear(self._norm(x, norms[0]), qkv)
            x = x + self._attend(self._heads(heads, given, 3), pasts, out, groups)
            asking = self._heads(_linear(self._norm(x, norms[1]), query), given, 1)
            told = [one[2 * block : 2 * block + 2] for one in readings]
            both = [(*one, *other) for one, other in zip(asking, told, strict=True)]
            x = x + self._attend(both, padding, read_out, groups)
            x = x + self._feed(self._norm(x, norms[2]), weights.feeds[self.shape.encoder + block])
        x = self._norm(x, weights.norms[-1]) * self.shape.width**-0.5
        logits: Tensor = x @ weights.shared.T
        return logits

    def _attend(
        self, heads: Sequence[tuple[Tensor, ...]], masks: Sequence[Tensor], out: Tensor, groups: int
    ) -> Tensor:
        """(G, N, width) of attention in each bucket.

        Args:
            heads: q, k and v of each bucket, (rows, heads, tokens, head).
            masks: added to the scores of each bucket.
            out: the last matrix.
            groups: G.
        """
        found = []
        for (q, k, v), mask in zip(heads, masks, strict=True):
            mask = mask.expand(len(q), -1, -1, -1)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
            found.append(mixed.transpose(1, 2).reshape(groups, -1, self.shape.width))
        return _linear(torch.cat(found, 1) if len(found) > 1 else found[0], out)

    def _heads(self, x: Tensor, ids: Sequence[Tensor], count: int) -> list[tuple[Tensor, ...]]:
        """`count` parts of the last dimension of x, (rows, heads, tokens, head) in each bucket of `ids`."""
        sizes = [one.numel() // len(x) for one in ids]
        return [
            part.reshape(len(one), -1, count, self.shape.heads, self.shape.head)
            .permute(2, 0, 3, 1, 4)
            .unbind()
            for part, one in zip(torch.split(x, sizes, 1), ids, strict=True)
        ]

    def _feed(self, x: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
        gate, value = _linear(x, weights[0]).chunk(2, -1)
        return _linear(F.gelu(gate, approximate="tanh") * value, weights[1])

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (self.shape.width,), weight, 1e-6)

    def _bias(self, table: Tensor, numbers: Tensor) -> Tensor:
        """(1, heads, queries, keys)."""
        return (numbers @ table).permute(2, 0, 1).unsqueeze(0)

    def _embedded(self, weights: _Weights, ids: Sequence[Tensor], groups: int) -> Tensor:
        together = torch.cat([one.reshape(groups, -1) for one in ids], 1)
        if not weights.shared.requires_grad:
            return F.embedding(together, weights.shared)
        return (together.unsqueeze(-1) == self._tokens).to(self.dtype) @ weights.shared

    def _padding(self, ids: Tensor) -> Tensor:
        return (ids == 0)[:, None, None, :].to(self.dtype) * _MASKED


def _groups(lora: Stacks | None) -> int:
    return 1 if lora is None else len(lora["square.A"])


def _parts(matrices: Tensor, counts: list[int]) -> list[Tensor]:
    """A stack ((G,) matrices, out, in) as ((G,) count * out, in) of each count."""
    return [part.flatten(-3, -2) for part in torch.split(matrices, counts, -3)]


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (G, N, in) by a weight (out, in) of all, or (G, out, in) of each."""
    return x @ weight.transpose(-2, -1)
