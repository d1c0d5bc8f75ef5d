"""Z-Image: under the names of diffusers, and of its makers as in ComfyUI's fused form.

Image and text run through refiners of their own and then through all layers in one sequence, both padded to
multiples of 32 tokens: image first in diffusers, whose network reads lists, text first in ComfyUI.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from .base import CONTEXT, DENOISER, EMBEDDING, JOINT, TOKENS, Base, Forward
from .families import LUMINA2, Z_IMAGE
from .looking import Looks
from .patches import any_length, grid_of, patched_grid
from .stacks import Blocks, Leaf, Stack
from .transformers import LYCORIS, PREFIXES, TRANSFORMER, WRITERS

# Image and text are padded to multiples of so many tokens.
_MULTIPLE = 32
# Width of Lumina 2, whose makers gave blocks the same names.
_WIDTH_OF_LUMINA = 2304


def _leaves(stream: str, *, modulated: bool) -> tuple[Leaf, ...]:
    return (
        *((Leaf("adaLN_modulation.0", EMBEDDING),) if modulated else ()),
        *(Leaf(f"attention.to_{x}", stream, "attention") for x in "qkv"),
        Leaf("attention.to_out.0", stream),
        *(Leaf(f"feed_forward.w{x}", stream, "feed_forward") for x in "13"),
        Leaf("feed_forward.w2", stream),
    )


_NATIVE: Mapping[str, str | Mapping[str, int]] = {
    "attention.qkv": {f"attention.to_{x}": 1 for x in "qkv"},
    "attention.out": "attention.to_out.0",
}


def _read(args: tuple[Any, ...], kwargs: Mapping[str, Any], given: tuple[int, int] | None) -> Forward:
    """Lists of latents (C, 1, H, W) and texts (L, d), or latents (B, C, H, W) and texts (B, L, d)."""
    first = args[0] if args else kwargs.get("x")
    time = args[1] if len(args) > 1 else kwargs.get("t", kwargs.get("timesteps"))
    text = args[2] if len(args) > 2 else kwargs.get("cap_feats", kwargs.get("context"))
    if isinstance(first, Tensor):
        return _read_batch(first, time, text, args[4] if len(args) > 4 else kwargs.get("attention_mask"))
    read = Forward(time=time, clean=1.0, noise=0.0)
    if not _are_tensors(first) or not _are_tensors(text):
        return read  # pictures among the text: where tokens lie is not known
    sizes = {tuple(one.shape[-2:]) for one in first}
    if len(sizes) > 1:
        return read
    height, width = sizes.pop()
    read.size, read.text = (height, width), text
    grid = patched_grid(read.size)
    images, lengths = [grid[0] * grid[1]] * len(first), [len(one) for one in text]
    image, padded = _padded(images[0]), [_padded(length) for length in lengths]
    read.grid, read.references = grid_of(grid), image - images[0]
    read.spans = {TOKENS: slice(0, image), CONTEXT: slice(image, image + max(padded))}
    read.packed = {TOKENS: [image] * len(first), CONTEXT: padded}
    device = first[0].device
    read.masks = {TOKENS: _real(images, image, device), CONTEXT: _real(lengths, max(padded), device)}
    return read


def _read_batch(latents: Tensor, time: Any, text: Any, mask: Any) -> Forward:
    """ComfyUI's: the padding is appended inside the network, behind the embedders."""
    batch, grid = len(latents), patched_grid(latents.shape[-2:])
    tokens = grid[0] * grid[1]
    image = _padded(tokens)
    read = Forward(
        time=time,
        size=(latents.shape[-2], latents.shape[-1]),
        grid=grid_of(grid),
        references=image - tokens,
        masks={TOKENS: _real([tokens] * batch, image, latents.device)},
        appended={TOKENS: image - tokens},
    )
    if isinstance(text, Tensor):
        length = text.shape[1]
        padded = _padded(length)
        read.text = text
        read.spans = {CONTEXT: slice(0, padded), TOKENS: slice(padded, padded + image)}
        real = _real([length] * batch, padded, latents.device)
        if isinstance(mask, Tensor) and mask.shape[-1] == length:
            real = real & nn.functional.pad(mask.to(real.device).bool(), (0, padded - length))
        read.masks = {**read.masks, CONTEXT: real}
        read.appended = {**read.appended, CONTEXT: padded - length}
    return read


def _are_tensors(values: Any) -> TypeGuard[Sequence[Tensor]]:
    return isinstance(values, Sequence) and bool(values) and all(isinstance(one, Tensor) for one in values)


def _padded(tokens: int) -> int:
    return tokens + -tokens % _MULTIPLE


def _real(lengths: Sequence[int], longest: int, device: torch.device) -> Tensor:
    """(B, longest): which tokens are no padding."""
    return torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]


def _tell(slot: str, inputs: Mapping[str, int]) -> Base | None:
    width = next((inputs[name] for name in inputs if name.endswith(("to_q", "w1"))), None)
    return Base(LUMINA2 if width == _WIDTH_OF_LUMINA else Z_IMAGE, None)


Z_IMAGE_STACK = Stack(
    name="z_image",
    role=DENOISER,
    slots=(TRANSFORMER,),
    prefixes=PREFIXES,
    writers=WRITERS,
    families=(Z_IMAGE,),
    before=(
        *(Leaf(f"t_embedder.mlp.{layer}", EMBEDDING) for layer in (0, 2)),
        *(Leaf("all_x_embedder.2-1"), Leaf("cap_embedder.1", CONTEXT, after="noise_refiner")),
    ),
    blocks=(
        Blocks("noise_refiner", _leaves(TOKENS, modulated=True), names=_NATIVE),
        Blocks("context_refiner", _leaves(CONTEXT, modulated=False), names=_NATIVE, returns=(CONTEXT,)),
        Blocks("layers", _leaves(JOINT, modulated=True), names=_NATIVE, looks=Looks("attention.to_q")),
    ),
    after=(
        Leaf("all_final_layer.2-1.adaLN_modulation.1", EMBEDDING),
        Leaf("all_final_layer.2-1.linear", JOINT),
    ),
    names={
        "x_embedder": "all_x_embedder.2-1",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
        "final_layer.linear": "all_final_layer.2-1.linear",
    },
    marker=r"(?:^|\.)layers\.\d+\.feed_forward\.w1$",
    # Lumina 2 has an activation in front.
    stranger=r"(?:^|\.)layers\.\d+\.adaLN_modulation\.1$",
    refused=(
        (
            r"(?:^|_)siglip_(?:refiner|embedder)_",
            "the refiner of pictures that Z-Image Omni is shown is not gated",
        ),
    ),
    inputs=_read,
    counter=any_length("Z-Image", _MULTIPLE),
    kohya=LYCORIS,
    tell=_tell,
    text_gates=True,
)
