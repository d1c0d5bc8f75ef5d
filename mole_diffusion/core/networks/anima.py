"""Anima (Cosmos-Predict2): under the names of diffusers, and of its makers as in ComfyUI.

Text is attended to, as in a UNet; a picture is a video of one frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .base import CONTEXT, DENOISER, EMBEDDING, Base, Forward
from .families import ANIMA
from .looking import Looks
from .patches import counting, grid_of, patched_grid
from .stacks import Blocks, Leaf, Stack
from .transformers import KOHYA_UNET, PREFIXES, TRANSFORMER, WRITERS

# Tokens of a text, as its adapter pads it.
_TOKENS_OF_A_TEXT = 512
_LAYERS = {"self_attn": ("attn1", "norm1"), "cross_attn": ("attn2", "norm2"), "mlp": ("ff", "norm3")}


def _norm(number: int) -> tuple[Leaf, ...]:
    return tuple(Leaf(f"norm{number}.linear_{layer}", EMBEDDING) for layer in (1, 2))


_LEAVES = (
    *_norm(1),
    *(Leaf(f"attn1.to_{x}", source="attn1") for x in "qkv"),
    Leaf("attn1.to_out.0"),
    *_norm(2),
    Leaf("attn2.to_q"),
    *(Leaf(f"attn2.to_{x}", CONTEXT, "attn2.context") for x in "kv"),
    Leaf("attn2.to_out.0"),
    *_norm(3),
    *(Leaf("ff.net.0.proj"), Leaf("ff.net.2")),
)
_NATIVE: dict[str, str | Mapping[str, int]] = {
    **{
        f"{theirs}.{x}_proj": f"{ours}.to_{x}"
        for theirs, (ours, _) in _LAYERS.items()
        for x in "qkv"
        if ours != "ff"
    },
    **{f"{name}_attn.output_proj": f"attn{k}.to_out.0" for k, name in enumerate(("self", "cross"), 1)},
    "mlp.layer1": "ff.net.0.proj",
    "mlp.layer2": "ff.net.2",
    **{
        f"adaln_modulation_{theirs}.{layer}": f"{norm}.linear_{layer}"
        for theirs, (_, norm) in _LAYERS.items()
        for layer in (1, 2)
    },
}


def _read(args: tuple[Any, ...], kwargs: Mapping[str, Any], given: tuple[int, int] | None) -> Forward:
    """Latents (B, C, 1, H, W), a time up to 1, a text (B, L, d)."""
    latents = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
    time = args[1] if len(args) > 1 else kwargs.get("timestep", kwargs.get("timesteps"))
    text = args[2] if len(args) > 2 else kwargs.get("encoder_hidden_states", kwargs.get("context"))
    if not isinstance(latents, Tensor) or latents.dim() != 5:
        return Forward(time=time)
    size = given or (latents.shape[-2], latents.shape[-1])
    read = Forward(time=time, size=size, grid=grid_of(patched_grid(size)), pictures=latents.shape[0])
    read.text = text if isinstance(text, Tensor) and text.dim() == 3 else None
    if isinstance(mask := kwargs.get("attention_mask"), Tensor) and mask.dim() == 2:
        read.masks = {CONTEXT: mask}
    return read


ANIMA_STACK = Stack(
    name="anima",
    role=DENOISER,
    slots=(TRANSFORMER,),
    prefixes=PREFIXES,
    writers=WRITERS,
    families=(ANIMA,),
    before=(
        # Its tokens lie in three axes.
        Leaf("patch_embed.proj", folds=True),
        *(Leaf(f"time_embed.t_embedder.linear_{layer}", EMBEDDING) for layer in (1, 2)),
    ),
    blocks=(
        Blocks(
            "transformer_blocks",
            _LEAVES,
            also=("blocks",),
            names=_NATIVE,
            looks=Looks("attn2.to_q", apart=True),
        ),
    ),
    after=(
        *(Leaf(f"norm_out.linear_{layer}", EMBEDDING) for layer in (1, 2)),
        Leaf("proj_out"),
    ),
    names={
        "x_embedder.proj.1": "patch_embed.proj",
        **{f"t_embedder.1.linear_{layer}": f"time_embed.t_embedder.linear_{layer}" for layer in (1, 2)},
        **{f"final_layer.adaln_modulation.{layer}": f"norm_out.linear_{layer}" for layer in (1, 2)},
        "final_layer.linear": "proj_out",
    },
    marker=r"(?:^|\.)blocks\.\d+\.adaln_modulation_self_attn\.2$"
    r"|(?:^|\.)transformer_blocks\.\d+\.norm1\.linear_2$",
    beside="llm_adapter",
    refused=(
        (
            r"(?:^|_)(?:llm_adapter|text_conditioner)_",
            "Anima's adapter between its language model and the transformer runs beside it and is not gated",
        ),
    ),
    inputs=_read,
    counter=counting(_TOKENS_OF_A_TEXT),
    kohya=KOHYA_UNET,
    kohya_native=True,
    tell=lambda slot, inputs: Base(ANIMA, None),
    text_gates=True,
)
