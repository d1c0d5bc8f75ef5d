"""Qwen-Image: image and text apart in every block, under the names that diffusers and ComfyUI share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .base import CONTEXT, DENOISER, EMBEDDING, TOKENS, Base, Forward
from .families import QWEN_IMAGE
from .looking import Looks
from .patches import any_length, grid_of, patched_grid
from .stacks import Blocks, Leaf, Stack
from .transformers import LYCORIS, PREFIXES, TRANSFORMER, WRITERS

_LEAVES = (
    *(Leaf("img_mod.1", EMBEDDING), Leaf("txt_mod.1", EMBEDDING)),
    *(Leaf(f"attn.to_{x}", source="attn") for x in "qkv"),
    *(Leaf(f"attn.add_{x}_proj", CONTEXT, "attn.add") for x in "qkv"),
    *(Leaf("attn.to_out.0"), Leaf("attn.to_add_out", CONTEXT)),
    *(Leaf("img_mlp.net.0.proj"), Leaf("img_mlp.net.2")),
    *(Leaf("txt_mlp.net.0.proj", CONTEXT), Leaf("txt_mlp.net.2", CONTEXT)),
)
_ROWS: dict[str, str | Mapping[str, int]] = {
    "attn.to_qkv": {f"attn.to_{x}": 1 for x in "qkv"},
    "attn.to_added_qkv": {f"attn.add_{x}_proj": 1 for x in "qkv"},
}


def _read(args: tuple[Any, ...], kwargs: Mapping[str, Any], given: tuple[int, int] | None) -> Forward:
    """Packed latents (B, L, c) with the shapes of all pictures, or latents (B, C, 1, H, W)."""
    first = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
    if not isinstance(first, Tensor):
        return Forward()
    if first.dim() == 3:
        return _read_packed(first, kwargs)
    time = args[1] if len(args) > 1 else kwargs.get("timestep", kwargs.get("timesteps"))
    mask = args[3] if len(args) > 3 else kwargs.get("attention_mask")
    grid = patched_grid(first.shape[-2:])
    shown = sum(
        rows * columns
        for one in kwargs.get("ref_latents") or ()
        for rows, columns in [patched_grid(one.shape[-2:])]
    )
    text = args[2] if len(args) > 2 else kwargs.get("context")
    return _forward(first, text, time, grid, shown, mask)


def _read_packed(image: Tensor, kwargs: Mapping[str, Any]) -> Forward:
    time, mask = kwargs.get("timestep"), kwargs.get("encoder_hidden_states_mask")
    shapes = kwargs.get("img_shapes")
    sizes = {tuple(one[0] if isinstance(one, list) else one) for one in shapes or ()}
    if len(sizes) != 1:
        return Forward(time=time, masks={CONTEXT: mask} if isinstance(mask, Tensor) else {})
    _, rows, columns = sizes.pop()
    text = kwargs.get("encoder_hidden_states")
    return _forward(image, text, time, (rows, columns), image.shape[1] - rows * columns, mask)


def _forward(image: Tensor, text: Any, time: Any, grid: tuple[int, int], shown: int, mask: Any) -> Forward:
    """Tokens of the picture, then those of the pictures that are shown; in attention, behind the text."""
    read = Forward(time=time, size=(2 * grid[0], 2 * grid[1]), grid=grid_of(grid), references=max(shown, 0))
    own = grid[0] * grid[1]
    if isinstance(text, Tensor) and text.dim() == 3:
        read.text, words = text, text.shape[1]
        read.spans = {CONTEXT: slice(0, words), TOKENS: slice(words, words + own + read.references)}
    if isinstance(mask, Tensor) and mask.dim() == 2:
        read.masks = {CONTEXT: mask}
    if shown > 0:
        real = torch.arange(own + shown, device=image.device) < own
        read.masks = {**read.masks, TOKENS: real.expand(len(image), -1)}
    return read


QWEN_IMAGE_STACK = Stack(
    name="qwen_image",
    role=DENOISER,
    slots=(TRANSFORMER,),
    prefixes=PREFIXES,
    writers=WRITERS,
    families=(QWEN_IMAGE,),
    before=(
        *(Leaf("img_in"), Leaf("txt_in", CONTEXT)),
        *(Leaf(f"time_text_embed.timestep_embedder.linear_{number}", EMBEDDING) for number in (1, 2)),
    ),
    blocks=(
        Blocks(
            "transformer_blocks",
            _LEAVES,
            names=_ROWS,
            returns=(CONTEXT, TOKENS),
            looks=Looks("attn.to_q"),
        ),
    ),
    after=(Leaf("norm_out.linear", EMBEDDING), Leaf("proj_out")),
    marker=r"(?:^|\.)transformer_blocks\.\d+\.img_mlp\.net\.0\.proj$",
    inputs=_read,
    counter=any_length("Qwen-Image"),
    kohya=LYCORIS,
    tell=lambda slot, inputs: Base(QWEN_IMAGE, None) if any(map(_is_own, inputs)) else None,
    text_gates=True,
)


def _is_own(name: str) -> bool:
    """Whether no other family has a matrix of this name; attention is as in others."""
    return (
        any(f".{part}." in name for part in ("img_mod", "txt_mod", "img_mlp", "txt_mlp")) or name == "txt_in"
    )
