"""Parameters of a T5: before training, and between transformers' names and stacks.

The matrices of one shape lie in one tensor (`Stacks`), so that a step casts, adds and updates a handful of
tensors; `named` and `stacked` go to and from the names of transformers' `T5ForConditionalGeneration`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .shape import Shape

#: Parameters by kind; see `fresh`.
Stacks = Mapping[str, Tensor]


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
