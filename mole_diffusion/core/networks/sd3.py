"""Stable Diffusion 3 and 3.5: image and text apart in every block, the last of which ends the text.

Names of diffusers, and of Stability AI as in ComfyUI and kohya's files. Latents are read as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from .base import CONTEXT, DENOISER, EMBEDDING, TOKENS, Base, Forward
from .families import SD3 as FAMILY
from .looking import Looks
from .patches import counting, grid_of, patched_grid
from .stacks import Blocks, Leaf, Stack
from .transformers import KOHYA, PREFIXES, TRANSFORMER, WRITERS

# CLIP's tokens, and T5's as pipelines pad them.
_TOKENS_OF_A_TEXT = 77 + 256
# What the timestep counts to.
_STEPS = 1000.0

_LEAVES = (
    # The second is not found under Stability AI's names, see `refused`.
    *(Leaf("norm1.linear", EMBEDDING), Leaf("norm1_context.linear", EMBEDDING, identifies=False)),
    *(Leaf(f"attn.to_{x}", source="attn") for x in "qkv"),
    *(Leaf(f"attn.add_{x}_proj", CONTEXT, "attn.add") for x in "qkv"),
    *(Leaf("attn.to_add_out", CONTEXT), Leaf("attn.to_out.0")),
    *(Leaf(f"attn2.to_{x}", source="attn2") for x in "qkv"),
    *(Leaf("attn2.to_out.0"), Leaf("ff.net.0.proj"), Leaf("ff.net.2")),
    *(Leaf("ff_context.net.0.proj", CONTEXT), Leaf("ff_context.net.2", CONTEXT)),
)
_NATIVE: dict[str, str | Mapping[str, int]] = {
    "x_block.attn.qkv": {f"attn.to_{x}": 1 for x in "qkv"},
    "x_block.attn2.qkv": {f"attn2.to_{x}": 1 for x in "qkv"},
    "context_block.attn.qkv": {f"attn.add_{x}_proj": 1 for x in "qkv"},
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.proj": "attn2.to_out.0",
    "context_block.attn.proj": "attn.to_add_out",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
    "x_block.adaLN_modulation.1": "norm1.linear",
}
_EMBEDDERS = {"t_embedder": "timestep", "y_embedder": "text"}


# Width of SD 3 and SD 3.5 medium, and of SD 3.5 large.
_WIDTHS = (1536, 2432)


def _tell(slot: str, inputs: Mapping[str, int]) -> Base | None:
    """FLUX.1's double blocks have the same names, but other widths, and none of them ends the text."""
    width = next((inputs[name] for name in inputs if name.endswith("attn.to_q")), 0)
    own = "pos_embed.proj" in inputs or any(".attn2." in name for name in inputs)
    return Base(FAMILY, None) if own or width in _WIDTHS or _ends_the_text(inputs) else None


def _ends_the_text(names: Iterable[str]) -> bool:
    """Whether the last block reads the text and gives none on, while those before it do."""
    readers, writers = (
        {
            int(name.split(".")[1])
            for name in names
            if re.match(rf"transformer_blocks\.\d+\.attn\.{leaf}$", name)
        }
        for leaf in ("add_k_proj", "to_add_out")
    )
    return len(readers) > 1 and readers - writers == {max(readers)}


def _read(args: tuple[Any, ...], kwargs: Mapping[str, Any], given: tuple[int, int] | None) -> Forward:
    """Latents (B, C, H, W), a timestep up to 1000 and a text, by diffusers' names or in ComfyUI's order.

    They attend to each other in one sequence, the text last in diffusers and first in ComfyUI.
    """
    latent = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
    time = kwargs.get("timestep", kwargs.get("timesteps"))
    native = time is None and len(args) > 1 and "encoder_hidden_states" not in kwargs
    if native:
        time = args[1]
    text = kwargs.get("encoder_hidden_states", kwargs.get("context", args[2] if len(args) > 2 else None))
    size = given
    if size is None and isinstance(latent, Tensor) and latent.dim() == 4:
        size = (latent.shape[-2], latent.shape[-1])
    grid = None if size is None else patched_grid(size)
    read = Forward(time=time, noise=_STEPS, size=size, grid=None if grid is None else grid_of(grid))
    if grid is not None and isinstance(text, Tensor) and text.dim() == 3:
        read.text, image = text, grid[0] * grid[1]
        start = text.shape[1] if native else 0
        words = slice(0, start) if native else slice(image, image + text.shape[1])
        read.spans = {TOKENS: slice(start, start + image), CONTEXT: words}
    return read


SD3 = Stack(
    name="sd3",
    role=DENOISER,
    slots=(TRANSFORMER,),
    prefixes=PREFIXES,
    writers=WRITERS,
    families=(FAMILY,),
    before=(
        Leaf("pos_embed.proj", TOKENS),
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
            _LEAVES,
            also=("joint_blocks",),
            names=_NATIVE,
            returns=(CONTEXT, TOKENS),
            looks=Looks("attn.to_q"),
        ),
    ),
    after=(Leaf("norm_out.linear", EMBEDDING), Leaf("proj_out")),
    names={
        "x_embedder.proj": "pos_embed.proj",
        **{
            f"{theirs}.mlp.{2 * layer}": f"time_text_embed.{ours}_embedder.linear_{layer + 1}"
            for theirs, ours in _EMBEDDERS.items()
            for layer in (0, 1)
        },
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "final_layer.linear": "proj_out",
    },
    swapped=("final_layer.adaLN_modulation.1",),
    marker=r"(?:^|\.)(?:transformer_blocks\.\d+\.attn\.add_q_proj|joint_blocks\.\d+\.context_block\.attn\.qkv)$",
    stranger=r"single_(?:transformer_)?blocks|img_m(?:lp|od)|token_refiner",
    refused=(
        (
            r"context_block_adaLN_modulation",
            "the halves of this matrix stand in another order in the last block, and no name tells which",
        ),
    ),
    inputs=_read,
    counter=counting(_TOKENS_OF_A_TEXT),
    kohya=KOHYA,
    tell=_tell,
    # Of the image alone; Anima's `attn2` reads the text, which is of another width.
    ratios={"attn2.to_k": (1, 1), "attn2.to_v": (1, 1)},
    text_gates=True,
)
