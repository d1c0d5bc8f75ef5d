"""FLUX.2 (dev, klein): under the names of diffusers, and of Black Forest Labs as in ComfyUI and trainers.

Blocks are FLUX.1's, but for modulations that all blocks share, gated feed-forwards, and single blocks whose
attention and feed-forward are one matrix everywhere. Pictures are packed outside the network.
"""

from __future__ import annotations

from collections.abc import Mapping

from .base import CONTEXT, DENOISER, EMBEDDING, JOINT, TOKENS, Base
from .families import FLUX2
from .flux import IMAGE_ROWS, TEXT_ROWS, TOKENS_OF_A_TEXT, reading
from .looking import Looks
from .patches import counting
from .stacks import Blocks, Leaf, Stack
from .transformers import KOHYA, PREFIXES, TRANSFORMER, WRITERS

_DOUBLE = (
    *(Leaf(f"attn.to_{x}", source="attn") for x in "qkv"),
    *(Leaf(f"attn.add_{x}_proj", CONTEXT, "attn.add") for x in "qkv"),
    *(Leaf("attn.to_add_out", CONTEXT), Leaf("attn.to_out.0")),
    *(Leaf("ff.linear_in"), Leaf("ff.linear_out")),
    *(Leaf("ff_context.linear_in", CONTEXT), Leaf("ff_context.linear_out", CONTEXT)),
)
_SINGLE = (Leaf("attn.to_qkv_mlp_proj", JOINT), Leaf("attn.to_out", JOINT))
_NATIVE_DOUBLE: dict[str, str | Mapping[str, int]] = {
    "attn.to_qkv": IMAGE_ROWS,
    "attn.to_added_qkv": TEXT_ROWS,
    "img_attn.qkv": IMAGE_ROWS,
    "txt_attn.qkv": TEXT_ROWS,
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
_MODULATIONS = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
_EMBEDDERS = {"time_in": "timestep", "guidance_in": "guidance"}

FLUX2_STACK = Stack(
    name="flux2",
    role=DENOISER,
    slots=(TRANSFORMER,),
    prefixes=PREFIXES,
    writers=WRITERS,
    families=(FLUX2,),
    before=(
        *(
            Leaf(f"time_guidance_embed.{kind}_embedder.linear_{number}", EMBEDDING)
            for kind in _EMBEDDERS.values()
            for number in (1, 2)
        ),
        *(Leaf(f"{name}.linear", EMBEDDING) for name in _MODULATIONS),
        *(Leaf("x_embedder"), Leaf("context_embedder", CONTEXT)),
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
            names={"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"},
            looks=Looks("attn.to_qkv_mlp_proj"),
        ),
    ),
    after=(Leaf("norm_out.linear", EMBEDDING), Leaf("proj_out")),
    names={
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        **{f"{name}.lin": f"{name}.linear" for name in _MODULATIONS},
        **{
            f"{theirs}.{layer}": f"time_guidance_embed.{ours}_embedder.linear_{number}"
            for theirs, ours in _EMBEDDERS.items()
            for number, layer in enumerate(("in_layer", "out_layer"), 1)
        },
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "final_layer.linear": "proj_out",
    },
    swapped=("final_layer.adaLN_modulation.1",),
    # Feed-forwards are three times as wide as the rest, and gated.
    ratios={
        **{f"{stream}_mlp.0": (6, 1) for stream in ("img", "txt")},
        **{f"{stream}_mlp.2": (1, 3) for stream in ("img", "txt")},
        "linear1": (9, 1),
        "linear2": (1, 4),
    },
    marker=r"(?:^|\.)double_stream_modulation_img\.lin(?:ear)?$",
    inputs=reading(patch=1),
    counter=counting(TOKENS_OF_A_TEXT, patch=1),
    kohya=KOHYA,
    tell=lambda slot, inputs: Base(FLUX2, None) if any(map(_is_own, inputs)) else None,
    text_gates=True,
)


def _is_own(name: str) -> bool:
    """Whether no other family has a matrix of this name; double blocks are as in others."""
    return name.startswith(("single_transformer_blocks.", "time_guidance_embed.", *_MODULATIONS)) or (
        name.startswith("transformer_blocks.") and ".linear_" in name
    )
