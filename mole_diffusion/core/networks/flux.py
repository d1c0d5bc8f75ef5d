"""FLUX.1 and Chroma: under the names of diffusers, and of Black Forest Labs as in ComfyUI and kohya's files.

Double blocks keep image and text apart, single blocks have them in one sequence, the text first. The network
reads packed latents (diffusers, two by two pixels to a token) or latents as they are (ComfyUI).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .base import CONTEXT, DENOISER, EMBEDDING, JOINT, TOKENS, Base, Forward
from .families import CHROMA, FLUX1, KREA2, QWEN_IMAGE
from .looking import Looks
from .patches import counting, grid_of, patched_grid, picture_of
from .stacks import Blocks, Inputs, Leaf, Stack
from .transformers import KOHYA, PREFIXES, TRANSFORMER, WRITERS

# Width of attention -> family whose blocks have FLUX's names and that width, and how many a FLUX has of them.
_BY_WIDTH = {3072: (QWEN_IMAGE, 19), 6144: (KREA2, 8)}
#: Tokens of a text, as pipelines pad it.
TOKENS_OF_A_TEXT = 512

_DOUBLE = (
    *(Leaf("norm1.linear", EMBEDDING), Leaf("norm1_context.linear", EMBEDDING)),
    *(Leaf(f"attn.to_{x}", source="attn") for x in "qkv"),
    *(Leaf(f"attn.add_{x}_proj", CONTEXT, "attn.add") for x in "qkv"),
    *(Leaf("attn.to_out.0"), Leaf("attn.to_add_out", CONTEXT)),
    *(Leaf("ff.net.0.proj"), Leaf("ff.net.2")),
    *(Leaf("ff_context.net.0.proj", CONTEXT), Leaf("ff_context.net.2", CONTEXT)),
)
_SINGLE = (
    Leaf("norm.linear", EMBEDDING),
    # It runs first, is four times as wide, and some files do not have it.
    Leaf("proj_mlp", JOINT, "attn", leads=False),
    *(Leaf(f"attn.to_{x}", JOINT, "attn") for x in "qkv"),
    Leaf("proj_out", JOINT),
)
IMAGE_ROWS, TEXT_ROWS = ({f"attn.{name.format(x)}": 1 for x in "qkv"} for name in ("to_{}", "add_{}_proj"))
_NATIVE_DOUBLE: dict[str, str | Mapping[str, int]] = {
    "attn.to_qkv": IMAGE_ROWS,
    "attn.to_added_qkv": TEXT_ROWS,
    "img_attn.qkv": IMAGE_ROWS,
    "txt_attn.qkv": TEXT_ROWS,
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    # XLabs' processors.
    "qkv_lora1": IMAGE_ROWS,
    "qkv_lora2": TEXT_ROWS,
    "proj_lora1": "attn.to_out.0",
    "proj_lora2": "attn.to_add_out",
}
_NATIVE_SINGLE: dict[str, str | Mapping[str, int]] = {
    "attn.to_qkv": IMAGE_ROWS,
    "linear1": {**IMAGE_ROWS, "proj_mlp": 4},
    "linear2": "proj_out",
    "modulation.lin": "norm.linear",
    # XLabs' processors.
    "qkv": IMAGE_ROWS,
    "proj": "proj_out",
}
_EMBEDDERS = {"time_in": "timestep", "guidance_in": "guidance", "vector_in": "text"}
_NATIVE_ROOT = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    **{
        f"{theirs}.{layer}": f"time_text_embed.{ours}_embedder.linear_{number}"
        for theirs, ours in _EMBEDDERS.items()
        for number, layer in enumerate(("in_layer", "out_layer"), 1)
    },
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}


def reading(patch: int) -> Inputs:
    """What the inputs of a network say: packed latents (B, L, c) with ids of places, or latents (B, C, H, W).

    Args:
        patch: side of the square of latent pixels that is one token.
    """
    return partial(_read, patch=patch)


def _read(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], given: tuple[int, int] | None, *, patch: int
) -> Forward:
    first = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
    if not isinstance(first, Tensor):
        return Forward()
    if first.dim() == 3:
        return _read_packed(first, args, kwargs, given, patch)
    time = args[1] if len(args) > 1 else kwargs.get("timestep", kwargs.get("timesteps"))
    text = args[2] if len(args) > 2 else kwargs.get("context")
    grid = patched_grid(first.shape[-2:], patch)
    references = sum(
        rows * columns
        for one in kwargs.get("ref_latents") or ()
        for rows, columns in [patched_grid(one.shape[-2:], patch)]
    )
    size = (first.shape[-2], first.shape[-1])
    return _forward(time, text, size, grid, grid[0] * grid[1] + references, references, first)


def _read_packed(
    image: Tensor,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    given: tuple[int, int] | None,
    patch: int,
) -> Forward:
    text = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
    ids, tokens = kwargs.get("img_ids"), image.shape[1]
    own, grid = tokens, None
    if kwargs.get("kv_cache_mode") is not None:
        pass  # pictures that are shown stand in front, and only in the first step
    elif given is not None:
        grid = patched_grid(given, patch)
        own = grid[0] * grid[1]
    elif isinstance(ids, Tensor):
        own, grid = picture_of(ids)
    references = tokens - own if own <= tokens else 0
    size = given or (None if grid is None else (patch * grid[0], patch * grid[1]))
    read = _forward(kwargs.get("timestep"), text, size, grid, tokens, references, image)
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and isinstance(text, Tensor):
        read.masks = {**read.masks, CONTEXT: mask[:, : text.shape[1]]}
    return read


def _forward(
    time: Any,
    text: Any,
    size: tuple[int, int] | None,
    grid: tuple[int, int] | None,
    tokens: int,
    references: int,
    image: Tensor,
) -> Forward:
    """Text tokens, then those of the picture, then those of other pictures."""
    spans, masks = {}, {}
    text = text if isinstance(text, Tensor) and text.dim() == 3 else None
    if text is not None:
        length = text.shape[1]
        spans = {CONTEXT: slice(0, length), TOKENS: slice(length, length + tokens)}
    if references:
        masks[TOKENS] = (torch.arange(tokens, device=image.device) < tokens - references).expand(
            image.shape[0], -1
        )
    return Forward(
        time=time,
        size=size,
        grid=None if grid is None else grid_of(grid),
        spans=spans,
        masks=masks,
        references=references,
        text=text,
    )


def _tell(slot: str, inputs: Mapping[str, int]) -> Base | None:
    """Other families have double blocks of the same names; single ones are FLUX.1's and Chroma's.

    Attention alone is told by the number of blocks and their width, as far as it can be.
    """
    if _has_single(inputs):
        return Base(FLUX1, None)
    numbers = [int(name.split(".")[1]) for name in inputs if name.startswith("transformer_blocks.")]
    width = next((inputs[name] for name in inputs if name.endswith("attn.to_q")), 0)
    family, most = _BY_WIDTH.get(width, (None, 0))
    return Base(family, None) if family is not None and max(numbers, default=0) >= most else None


def _has_single(names: Mapping[str, int] | Sequence[str]) -> bool:
    return any(name.startswith("single_transformer_blocks.") for name in names)


FLUX = Stack(
    name="flux",
    role=DENOISER,
    slots=(TRANSFORMER,),
    prefixes=PREFIXES,
    writers=WRITERS,
    families=(FLUX1, CHROMA),
    before=(
        Leaf("x_embedder"),
        *(
            Leaf(f"time_text_embed.{kind}_embedder.linear_{number}", EMBEDDING)
            for kind in _EMBEDDERS.values()
            for number in (1, 2)
        ),
        Leaf("context_embedder", CONTEXT),
    ),
    blocks=(
        Blocks(
            "transformer_blocks",
            _DOUBLE,
            also=("double_blocks",),
            names=_NATIVE_DOUBLE,
            returns=(CONTEXT, TOKENS),
            returned_by={"DoubleStreamBlock": (TOKENS, CONTEXT)},
            looks=Looks("attn.to_q"),
        ),
        Blocks(
            "single_transformer_blocks",
            _SINGLE,
            also=("single_blocks",),
            names=_NATIVE_SINGLE,
            returned_by={"FluxSingleTransformerBlock": (CONTEXT, TOKENS)},
            looks=Looks("attn.to_q"),
        ),
    ),
    after=(Leaf("norm_out.linear", EMBEDDING), Leaf("proj_out")),
    names=_NATIVE_ROOT,
    swapped=("final_layer.adaLN_modulation.1",),
    marker=r"(?:^|\.)single_(?:transformer_)?blocks\.\d+\.(?:proj_mlp|linear1)$",
    stranger=r"token_refiner|double_stream_modulation|(?:^|\.)mode_blocks",
    refused=(
        (
            r"distilled_guidance_layer",
            "Chroma's distilled_guidance_layer makes the modulation of all blocks at once and is not gated",
        ),
    ),
    # Of files that FLUX.2's have the same names in.
    ratios={
        **{f"{stream}_mlp.0": (4, 1) for stream in ("img", "txt")},
        **{f"{stream}_mlp.2": (1, 4) for stream in ("img", "txt")},
        "linear1": (7, 1),
        "linear2": (1, 5),
    },
    inputs=reading(patch=2),
    counter=counting(TOKENS_OF_A_TEXT),
    kohya=KOHYA,
    tell=_tell,
    text_gates=True,
)
