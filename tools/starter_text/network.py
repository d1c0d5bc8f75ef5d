"""T5 as functions of its weights, so that many experts train side by side in one batch.

The weights have the names of transformers' `T5ForConditionalGeneration`; nothing here waits for the device,
so that a whole training step can be a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]
_MASKED = -1e4


@dataclass(frozen=True)
class Shape:
    """Sizes of a T5 with tied embeddings and gated GELU."""

    vocabulary: int
    width: int = 192
    inner: int = 512
    heads: int = 4
    head: int = 48
    encoder: int = 4
    decoder: int = 4
    buckets: int = 32
    distance: int = 64

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

    def linears(self) -> dict[str, tuple[int, int]]:
        """Dotted name -> (out, in) of every matrix that experts change."""
        inside = self.heads * self.head
        found = {}
        for part, layers in (("encoder", self.encoder), ("decoder", self.decoder)):
            for block in range(layers):
                at = f"{part}.block.{block}.layer"
                attentions = ["0.SelfAttention"] + (["1.EncDecAttention"] if part == "decoder" else [])
                for attention in attentions:
                    found |= {f"{at}.{attention}.{name}": (inside, self.width) for name in "qkv"}
                    found[f"{at}.{attention}.o"] = (self.width, inside)
                feed = f"{at}.{len(attentions)}.DenseReluDense"
                found |= {f"{feed}.{name}": (self.inner, self.width) for name in ("wi_0", "wi_1")}
                found[f"{feed}.wo"] = (self.width, self.inner)
        return found


def fresh(shape: Shape, embedding: float, seed: int) -> dict[str, Tensor]:
    """Weights before training, as transformers draws them but for the size of the embeddings."""
    rng = torch.Generator().manual_seed(seed)

    def normal(size: tuple[int, ...], std: float) -> Tensor:
        return torch.randn(size, generator=rng) * std

    weights = {"shared.weight": normal((shape.vocabulary, shape.width), embedding)}
    for name, (out, inputs) in shape.linears().items():
        std = (shape.width * shape.head) ** -0.5 if name.endswith(".q") else inputs**-0.5
        weights[f"{name}.weight"] = normal((out, inputs), std)
    for part, layers, kinds in (("encoder", shape.encoder, 2), ("decoder", shape.decoder, 3)):
        for block in range(layers):
            for layer in range(kinds):
                weights[f"{part}.block.{block}.layer.{layer}.layer_norm.weight"] = torch.ones(shape.width)
        weights[f"{part}.final_layer_norm.weight"] = torch.ones(shape.width)
        bias = normal((shape.buckets, shape.heads), shape.width**-0.5)
        weights[f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = bias
    return weights


def fresh_experts(shape: Shape, count: int, rank: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """(A (count, rank, in), B (count, out, rank)) of every matrix; all start from one A, and B = 0."""
    rng = torch.Generator().manual_seed(seed)
    found = {}
    for name, (out, inputs) in shape.linears().items():
        down = torch.randn(1, rank, inputs, generator=rng) * inputs**-0.5
        found[name] = down.expand(count, -1, -1).contiguous(), torch.zeros(count, out, rank)
    return found


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


class T5:
    """A T5's forward on given weights.

    Args:
        shape: its sizes.
        source, target: tokens of the longest source and target.
        device: where it runs.
        dtype: of matrix products; the rest is float32.
        experts: how many experts a batch is for, each with an equal share of its rows; 0 for the base alone.
        scaling: of the experts.
    """

    def __init__(
        self,
        shape: Shape,
        source: int,
        target: int,
        device: torch.device,
        dtype: torch.dtype,
        experts: int = 0,
        scaling: float = 2.0,
    ) -> None:
        self.shape, self.dtype, self.experts, self.scaling = shape, dtype, experts, scaling
        self._both = buckets(shape, source, source, both=True).to(device)
        self._past = buckets(shape, target, target, both=False).to(device)
        self._causal = torch.full((target, target), _MASKED, device=device).triu(1)

    def encode(
        self, weights: Weights, lora: Mapping[str, tuple[Tensor, Tensor]] | None, ids: Tensor
    ) -> Tensor:
        """(B, L, width) of sources (B, L)."""
        length = ids.shape[1]
        bias = self._bias(weights, "encoder", self._both[:length, :length]) + self._padding(ids)
        x = F.embedding(ids, weights["shared.weight"]).float()
        for block in range(self.shape.encoder):
            at = f"encoder.block.{block}.layer"
            x = x + self._attention(weights, lora, f"{at}.0", "SelfAttention", x, None, bias)
            x = x + self._feed(weights, lora, f"{at}.1", x)
        return _norm(x, weights["encoder.final_layer_norm.weight"])

    def decode(
        self,
        weights: Weights,
        lora: Mapping[str, tuple[Tensor, Tensor]] | None,
        given: Tensor,
        memory: Tensor,
        ids: Tensor,
    ) -> Tensor:
        """(B, T, vocabulary) logits after the tokens (B, T), from the encoder's states of sources `ids`."""
        length = given.shape[1]
        bias = self._bias(weights, "decoder", self._past[:length, :length]) + self._causal[:length, :length]
        x = F.embedding(given, weights["shared.weight"]).float()
        padding = self._padding(ids)
        for block in range(self.shape.decoder):
            at = f"decoder.block.{block}.layer"
            x = x + self._attention(weights, lora, f"{at}.0", "SelfAttention", x, None, bias)
            x = x + self._attention(weights, lora, f"{at}.1", "EncDecAttention", x, memory, padding)
            x = x + self._feed(weights, lora, f"{at}.2", x)
        x = _norm(x, weights["decoder.final_layer_norm.weight"]) * self.shape.width**-0.5
        return (x.to(self.dtype) @ weights["shared.weight"].to(self.dtype).T).float()

    def loss(
        self, weights: Weights, lora: Mapping[str, tuple[Tensor, Tensor]] | None, ids: Tensor, targets: Tensor
    ) -> Tensor:
        """Mean cross entropy; the sum of the experts' means where there are several."""
        memory = self.encode(weights, lora, ids)
        logits = self.decode(weights, lora, F.pad(targets[:, :-1], (1, 0)), memory, ids)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        real = (targets != 0).float().view(max(self.experts, 1), -1)
        each = (losses.view(real.shape) * real).sum(1) / real.sum(1)
        return each.sum()

    @torch.no_grad()
    def greedy(
        self, weights: Weights, lora: Mapping[str, tuple[Tensor, Tensor]] | None, ids: Tensor, length: int
    ) -> Tensor:
        """(B, length) most likely tokens."""
        memory = self.encode(weights, lora, ids)
        given = torch.zeros(len(ids), 1, dtype=torch.long, device=ids.device)
        for _ in range(length):
            following = self.decode(weights, lora, given, memory, ids)[:, -1].argmax(-1, keepdim=True)
            given = torch.cat([given, following], 1)
        return given[:, 1:]

    def _bias(self, weights: Weights, part: str, numbers: Tensor) -> Tensor:
        table = weights[f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        return F.embedding(numbers, table).permute(2, 0, 1).unsqueeze(0)

    def _padding(self, ids: Tensor) -> Tensor:
        return (ids == 0).float()[:, None, None, :] * _MASKED

    def _linear(
        self, weights: Weights, lora: Mapping[str, tuple[Tensor, Tensor]] | None, name: str, x: Tensor
    ) -> Tensor:
        out = x @ weights[f"{name}.weight"].to(self.dtype).T
        if lora is None or name not in lora:
            return out
        down, up = (factor.to(self.dtype) for factor in lora[name])
        rows = x.reshape(len(down), -1, x.shape[-1])
        delta = torch.bmm(torch.bmm(rows, down.transpose(1, 2)), up.transpose(1, 2))
        return out + self.scaling * delta.view(out.shape)

    def _attention(
        self,
        weights: Weights,
        lora: Mapping[str, tuple[Tensor, Tensor]] | None,
        at: str,
        kind: str,
        x: Tensor,
        memory: Tensor | None,
        bias: Tensor,
    ) -> Tensor:
        x = _norm(x, weights[f"{at}.layer_norm.weight"]).to(self.dtype)
        read = x if memory is None else memory.to(self.dtype)
        q, k, v = (
            self._linear(weights, lora, f"{at}.{kind}.{name}", tokens)
            .view(len(x), -1, self.shape.heads, self.shape.head)
            .transpose(1, 2)
            for name, tokens in (("q", x), ("k", read), ("v", read))
        )
        scores = (q @ k.transpose(2, 3)).float() + bias
        mixed = torch.softmax(scores, -1).to(self.dtype) @ v
        mixed = mixed.transpose(1, 2).reshape(len(x), -1, self.shape.heads * self.shape.head)
        return self._linear(weights, lora, f"{at}.{kind}.o", mixed).float()

    def _feed(
        self, weights: Weights, lora: Mapping[str, tuple[Tensor, Tensor]] | None, at: str, x: Tensor
    ) -> Tensor:
        x = _norm(x, weights[f"{at}.layer_norm.weight"]).to(self.dtype)
        name = f"{at}.DenseReluDense"
        gate = F.gelu(self._linear(weights, lora, f"{name}.wi_0", x), approximate="tanh")
        return self._linear(
            weights, lora, f"{name}.wo", gate * self._linear(weights, lora, f"{name}.wi_1", x)
        ).float()


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight
