"""T5 as functions of its weights, made for speed: few large products, half precision, little padding.

The matrices of one shape lie in one tensor (`Stacks`), so that a step casts, adds and updates a handful of
tensors; `named` and `stacked` go to and from the names of transformers' `T5ForConditionalGeneration`. Rows of
different lengths come in buckets: linear maps and norms see the tokens of all of them at once, attention each
bucket by itself. Nothing here waits for the device, so that a whole training step can be a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

#: Parameters by kind; see `fresh`.
Stacks = Mapping[str, Tensor]
#: (sources (G * rows, L), targets (G * rows, T)) of each bucket; G is the number of experts, or 1.
Batch = Sequence[tuple[Tensor, Tensor]]
_MASKED = -1e4
_KINDS = ("square", "wide", "narrow")


@dataclass(frozen=True)
class Shape:
    """Sizes of a T5 with tied embeddings and gated GELU, whose heads together are as wide as the model.

    Raises:
        ValueError: they are not.
    """

    vocabulary: int
    width: int = 192
    inner: int = 512
    heads: int = 4
    head: int = 48
    encoder: int = 4
    decoder: int = 4
    buckets: int = 32
    distance: int = 64

    def __post_init__(self) -> None:
        """Check the heads."""
        if self.heads * self.head != self.width:
            raise ValueError(
                f"heads * head is {self.heads * self.head}; it has to be the width {self.width}."
            )

    def config(self) -> dict[str, object]:
        """Arguments of transformers' `T5Config`."""
        return {
            "vocab_size": self.vocabulary,
            "d_model": self.width,
            "d_ff": self.inner,
            "num_heads": self.heads,
            "d_kv": self.head,
            "num_layers": self.encoder,
            "num_decoder_layers": self.decoder,
            "relative_attention_num_buckets": self.buckets,
            "relative_attention_max_distance": self.distance,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": True,
            "dropout_rate": 0.0,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
        }

    def linears(self) -> dict[str, list[str]]:
        """Kind of stack -> names of its matrices, in their order.

        "square" (width, width), "wide" (inner, width) and "narrow" (width, inner). What reads the same input
        lies side by side: q, k and v; wi_0 and wi_1; k and v of all the decoder's readings of the encoder.
        """
        square = [
            f"encoder.block.{block}.layer.0.SelfAttention.{one}"
            for block in range(self.encoder)
            for one in "qkvo"
        ]
        for block in range(self.decoder):
            at = f"decoder.block.{block}.layer"
            square += [f"{at}.0.SelfAttention.{one}" for one in "qkvo"]
            square += [f"{at}.1.EncDecAttention.{one}" for one in "qo"]
        square += [
            f"decoder.block.{block}.layer.1.EncDecAttention.{one}"
            for block in range(self.decoder)
            for one in "kv"
        ]
        feeds = [f"encoder.block.{block}.layer.1.DenseReluDense" for block in range(self.encoder)]
        feeds += [f"decoder.block.{block}.layer.2.DenseReluDense" for block in range(self.decoder)]
        wide = [f"{feed}.{one}" for feed in feeds for one in ("wi_0", "wi_1")]
        return {"square": square, "wide": wide, "narrow": [f"{feed}.wo" for feed in feeds]}

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Kind of stack -> (out, in) of its matrices."""
        return {
            "square": (self.width, self.width),
            "wide": (self.inner, self.width),
            "narrow": (self.width, self.inner),
        }

    def norms(self) -> list[str]:
        """Names of the norms' weights, in their order."""
        found = []
        for part, layers, kinds in (("encoder", self.encoder, 2), ("decoder", self.decoder, 3)):
            found += [
                f"{part}.block.{block}.layer.{layer}.layer_norm.weight"
                for block in range(layers)
                for layer in range(kinds)
            ]
            found.append(f"{part}.final_layer_norm.weight")
        return found


def _bias_name(part: str) -> str:
    return f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def named(shape: Shape, stacks: Stacks) -> dict[str, Tensor]:
    """The weights under transformers' names."""
    weights = {"shared.weight": stacks["shared"]}
    for kind, names in shape.linears().items():
        weights |= {f"{name}.weight": stacks[kind][number] for number, name in enumerate(names)}
    weights |= {name: stacks["norms"][number] for number, name in enumerate(shape.norms())}
    return weights | {_bias_name(part): stacks["bias"][k] for k, part in enumerate(("encoder", "decoder"))}


def stacked(shape: Shape, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stacks of weights with transformers' names."""
    stacks = {"shared": weights["shared.weight"]}
    for kind, names in shape.linears().items():
        stacks[kind] = torch.stack([weights[f"{name}.weight"] for name in names])
    stacks["norms"] = torch.stack([weights[name] for name in shape.norms()])
    stacks["bias"] = torch.stack([weights[_bias_name(part)] for part in ("encoder", "decoder")])
    return stacks


def fresh(shape: Shape, embedding: float, seed: int, *, mimetic: bool = True) -> dict[str, Tensor]:
    """Weights before training.

    Args:
        shape: sizes.
        embedding: standard deviation of the embeddings.
        seed: of the draw.
        mimetic: whether attention starts near what trained attention does (after Trockman and Kolter,
            "Mimetic Initialization of Self-Attention Layers", 2023): q is near k, so that tokens look at
            their like, o is near v transposed, so that they take over what they look at, and heads look at
            neighbours. Copying and looking up are then learned in hundreds of steps. Otherwise
            as transformers draws them.

    Returns:
        "shared" (vocabulary, width); "square", "wide" and "narrow" (matrices, out, in); "norms" (norms,
        width); "bias" (2, buckets, heads), of the encoder and the decoder.
    """
    rng = torch.Generator().manual_seed(seed)

    def normal(size: tuple[int, ...], std: float) -> Tensor:
        return torch.randn(size, generator=rng) * std

    weights = {"shared.weight": normal((shape.vocabulary, shape.width), embedding)}
    for kind, names in shape.linears().items():
        for name in names:
            size = shape.sizes()[kind]
            std = (size[1] * (shape.head if name.endswith(".q") else 1)) ** -0.5
            weights[f"{name}.weight"] = normal(size, std)
    weights |= {name: torch.ones(shape.width) for name in shape.norms()}
    for part in ("encoder", "decoder"):
        weights[_bias_name(part)] = normal((shape.buckets, shape.heads), shape.width**-0.5)
    if mimetic:
        _mimic(shape, weights)
    return stacked(shape, weights)


def _mimic(shape: Shape, weights: dict[str, Tensor]) -> None:
    for name in shape.linears()["square"]:
        if not name.endswith(".q"):
            continue
        q, k, v, o = (f"{name[:-1]}{one}.weight" for one in "qkvo")
        weights[q] = 0.3 * weights[q] + weights[k] * shape.head**-0.5
        weights[o] = 0.5 * weights[o] + 0.7 * weights[v].T
    # Numbers of the positions one before, two before, one behind, and of the token itself; see `buckets`.
    before, second, behind, itself = 1, 2, shape.buckets // 2 + 1, 0
    for part, places in (("encoder", (before, behind, second)), ("decoder", (before, itself, second))):
        table = torch.zeros(shape.buckets, shape.heads)
        for head, place in enumerate(places[: shape.heads]):
            table[place, head] = 2.0
        weights[_bias_name(part)] = table


def fresh_experts(shape: Shape, count: int, rank: int, seed: int) -> dict[str, Tensor]:
    """Factors before training; all experts start from one A, and from B = 0.

    Returns:
        "square.A" (count, matrices, rank, in), "square.B" (count, matrices, out, rank), and so on.
    """
    rng = torch.Generator().manual_seed(seed)
    found = {}
    for kind, names in shape.linears().items():
        out, inputs = shape.sizes()[kind]
        down = torch.randn(1, len(names), rank, inputs, generator=rng) * inputs**-0.5
        found[f"{kind}.A"] = down.expand(count, -1, -1, -1).contiguous()
        found[f"{kind}.B"] = torch.zeros(count, len(names), out, rank)
    return found


def named_experts(shape: Shape, lora: Stacks, number: int) -> dict[str, Tensor]:
    """The factors of one expert under the names of its matrices, as PEFT has them."""
    return {
        f"{name}.lora_{side}.weight": lora[f"{kind}.{side}"][number, at]
        for kind, names in shape.linears().items()
        for at, name in enumerate(names)
        for side in "AB"
    }


def stacked_experts(shape: Shape, experts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The stacks of several experts' factors; see `named_experts`."""
    return {
        f"{kind}.{side}": torch.stack(
            [torch.stack([one[f"{name}.lora_{side}.weight"] for name in names]) for one in experts]
        )
        for kind, names in shape.linears().items()
        for side in "AB"
    }


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
