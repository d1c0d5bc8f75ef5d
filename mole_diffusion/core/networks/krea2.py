"""Krea 2: under the names of diffusers, and of its makers as in ComfyUI and trainers.

What several layers of a language model say is fused over those layers, word by word, then over the words;
after that text and image run through all blocks in one sequence, the text first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .base import CONTEXT, DENOISER, EMBEDDING, JOINT, TOKENS, Base, Forward
from .families import KREA2
from .looking import Looks
from .patches import any_length, grid_of, patched_grid, picture_of
from .stacks import Blocks, Leaf, Stack
from .transformers import LYCORIS, PREFIXES, TRANSFORMER, WRITERS

_INPUTS = ("hidden_states", "encoder_hidden_states", "timestep", "position_ids", "encoder_attention_mask")
# The same of ComfyUI's network.
_NATIVE_INPUTS = ("x", "timesteps", "context", "attention_mask", "ref_latents")
_REFINED = "text_fusion.refiner_blocks"


def _leaves(stream: str, *, folds: bool = False) -> tuple[Leaf, ...]:
    attention = (f"attn.to_{x}" for x in ("q", "k", "v", "gate"))
    return (
        *(Leaf(name, stream, "attn", folds=folds) for name in attention),
        Leaf("attn.to_out.0", stream, folds=folds),
        *(Leaf(f"ff.{name}", stream, "ff", folds=folds) for name in ("gate", "up")),
        Leaf("ff.down", stream, folds=folds),
    )


_NATIVE: Mapping[str, str | Mapping[str, int]] = {
    **{f"attn.w{x}": f"attn.to_{x}" for x in "qkv"},
    "attn.gate": "attn.to_gate",
    "attn.wo": "attn.to_out.0",
    **{f"mlp.{name}": f"ff.{name}" for name in ("gate", "up", "down")},
}


def _read(args: tuple[Any, ...], kwargs: Mapping[str, Any], given: tuple[int, int] | None) -> Forward:
    """Packed latents (B, L, c), texts (B, T, layers, d), places (T + L, 3) of both; or as `_read_latents`."""
    first = args[0] if args else kwargs.get("x")
    if isinstance(first, Tensor) and first.dim() > 3:
        return _read_latents({**dict(zip(_NATIVE_INPUTS, args, strict=False)), **kwargs})
    named = {**dict(zip(_INPUTS, args, strict=False)), **kwargs}
    image, text = named.get("hidden_states"), named.get("encoder_hidden_states")
    if not isinstance(image, Tensor) or not isinstance(text, Tensor):
        return Forward()
    words = text.shape[1]
    read = Forward(
        time=named.get("timestep"),
        spans={CONTEXT: slice(0, words), TOKENS: slice(words, words + image.shape[1])},
        pictures=image.shape[0],
        text=text,
    )
    if isinstance(mask := named.get("encoder_attention_mask"), Tensor):
        read.masks = {CONTEXT: mask}
    if isinstance(places := named.get("position_ids"), Tensor):
        own, grid = picture_of(places, words)
        if grid is not None and own == image.shape[1]:
            read.size, read.grid = (2 * grid[0], 2 * grid[1]), grid_of(grid)
    return read


def _read_latents(named: Mapping[str, Any]) -> Forward:
    """ComfyUI's: latents (B, C, H, W) or (B, C, 1, H, W), texts (B, T, layers * d), latents of pictures that
    are shown. Its last matrix reads text and image.
    """
    latents, text = named["x"], named.get("context")
    own = patched_grid(latents.shape[-2:])
    read = Forward(
        time=named.get("timesteps"),
        size=(2 * own[0], 2 * own[1]),
        grid=grid_of(own),
        pictures=latents.shape[0] * (latents.shape[2] if latents.dim() == 5 else 1),
    )
    if not isinstance(text, Tensor):
        return read
    # Without a method they are not looked at.
    shown = (named.get("ref_latents") or ()) if named.get("ref_latents_method") is not None else ()
    read.references = sum(rows * columns for one in shown for rows, columns in [patched_grid(one.shape[-2:])])
    image = slice(text.shape[1], text.shape[1] + own[0] * own[1] + read.references)
    read.spans = {CONTEXT: slice(0, text.shape[1]), TOKENS: image}
    if read.references:
        real = torch.arange(image.stop - image.start, device=latents.device) < own[0] * own[1]
        read.masks = {TOKENS: real.expand(read.pictures, -1)}
    read.within, read.text = image, text
    return read


KREA2_STACK = Stack(
    name="krea2",
    role=DENOISER,
    slots=(TRANSFORMER,),
    prefixes=PREFIXES,
    writers=WRITERS,
    families=(KREA2,),
    before=(
        *(Leaf(f"time_embed.linear_{number}", EMBEDDING) for number in (1, 2)),
        Leaf("time_mod_proj", EMBEDDING),
        Leaf("text_fusion.projector", CONTEXT, after="text_fusion.layerwise_blocks", folds=True),
        *(Leaf(f"txt_in.linear_{number}", CONTEXT, after=_REFINED) for number in (1, 2)),
        Leaf("img_in", after=_REFINED),
    ),
    blocks=(
        Blocks(
            "text_fusion.layerwise_blocks",
            _leaves(CONTEXT, folds=True),
            also=("txtfusion.layerwise_blocks",),
            names=_NATIVE,
        ),
        Blocks(
            _REFINED,
            _leaves(CONTEXT),
            also=("txtfusion.refiner_blocks",),
            names=_NATIVE,
            returns=(CONTEXT,),
        ),
        Blocks(
            "transformer_blocks",
            _leaves(JOINT),
            also=("blocks",),
            names=_NATIVE,
            looks=Looks("attn.to_q"),
        ),
    ),
    after=(Leaf("final_layer.linear", amid=True),),
    names={
        "first": "img_in",
        "last.linear": "final_layer.linear",
        "tmlp.0": "time_embed.linear_1",
        "tmlp.2": "time_embed.linear_2",
        "tproj.1": "time_mod_proj",
        "txtmlp.1": "txt_in.linear_1",
        "txtmlp.3": "txt_in.linear_2",
        "txtfusion.projector": "text_fusion.projector",
    },
    marker=r"(?:^|\.)(?:text_fusion|txtfusion)\.projector$",
    inputs=_read,
    counter=any_length("Krea 2"),
    kohya=LYCORIS,
    tell=lambda slot, inputs: Base(KREA2, None) if any(map(_is_own, inputs)) else None,
    text_gates=True,
)


def _is_own(name: str) -> bool:
    """Whether no other family has a matrix of this name; queries, keys and values are as in others."""
    parts = ("text_fusion.", "time_mod_proj", ".attn.to_gate", ".ff.gate", ".ff.up", ".ff.down")
    return any(part in name for part in parts)
