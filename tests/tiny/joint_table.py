"""All that it takes to make `JointNetwork` composable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from mole_diffusion.core.networks.base import CONTEXT, DENOISER, EMBEDDING, JOINT, TOKENS, Forward
from mole_diffusion.core.networks.stacks import Blocks, Leaf, Stack

TEXT = 6
INPUTS = ("latent", "time", "text", "mask")
QKV = {"to_q": 1, "to_k": 1, "to_v": 1}


def attention(name: str, stream: str) -> tuple[Leaf, ...]:
    return tuple(Leaf(f"{name}.{leaf}", stream, name) for leaf in QKV)


def mlp(name: str, stream: str) -> tuple[Leaf, ...]:
    return Leaf(f"{name}.fc1", stream), Leaf(f"{name}.fc2", stream)


def fused(*names: str) -> dict[str, Mapping[str, int]]:
    return {f"{name}.qkv": {f"{name}.{leaf}": share for leaf, share in QKV.items()} for name in names}


def inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any], given: tuple[int, int] | None) -> Forward:
    """The text comes first; the time runs from 1, a clean picture, to 0; patches are 2 x 2."""
    named = {**dict(zip(INPUTS, args, strict=False)), **kwargs}
    size = given or tuple(named["latent"].shape[-2:])
    grid = size[0] // 2, size[1] // 2
    text, image = named["text"].shape[1], grid[0] * grid[1]
    return Forward(
        time=named["time"],
        clean=1.0,
        noise=0.0,
        size=size,
        grid=lambda tokens: grid if tokens == image else None,
        spans={CONTEXT: slice(0, text), TOKENS: slice(text, text + image)},
        masks={CONTEXT: named["mask"]},
    )


def count(network: nn.Module, stream: str, given: tuple[int, int] | int | None) -> int:
    height, width = given if isinstance(given, tuple) else (8, 8)
    return TEXT if stream == CONTEXT else height * width // 4


JOINT_TABLE = Stack(
    name="joint",
    role=DENOISER,
    slots=("transformer",),
    prefixes={"transformer": ("transformer_", "lora_transformer_")},
    before=(Leaf("time_in", EMBEDDING), Leaf("image_in"), Leaf("text_in", CONTEXT)),
    blocks=(
        Blocks(
            "apart",
            (
                Leaf("modulation", EMBEDDING),
                *(*attention("text", CONTEXT), *attention("image", TOKENS)),
                *(Leaf("text.out", CONTEXT), Leaf("image.out")),
                *(*mlp("text_mlp", CONTEXT), *mlp("image_mlp", TOKENS)),
            ),
            names=fused("text", "image"),
            returns=(CONTEXT, TOKENS),
        ),
        Blocks(
            "joined",
            (
                Leaf("modulation", EMBEDDING),
                Leaf("wide", JOINT, "attn", leads=False),
                *(*attention("attn", JOINT), Leaf("attn.out", JOINT), Leaf("narrow", JOINT)),
            ),
            names=fused("attn"),
        ),
    ),
    after=(Leaf("modulation_out", EMBEDDING), Leaf("image_out")),
    inputs=inputs,
    counter=count,
    kohya={"transformer": ("lora_transformer_", "lora_transformer_")},
    text_gates=True,
)
