"""What attention of diffusers' transformers looks at, computed by hand from what their layers are given."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_krea2 import Krea2Attention
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen
from torch import Tensor, nn

#: Paths of the layers in which image tokens look at text, by class of the network.
LAYERS = {
    "FluxTransformer2DModel": ("transformer_blocks", "single_transformer_blocks"),
    "ChromaTransformer2DModel": ("transformer_blocks", "single_transformer_blocks"),
    "Flux2Transformer2DModel": ("transformer_blocks", "single_transformer_blocks"),
    "SD3Transformer2DModel": ("transformer_blocks",),
    "QwenImageTransformer2DModel": ("transformer_blocks",),
    "Krea2Transformer2DModel": ("transformer_blocks",),
    "ZImageTransformer2DModel": ("layers",),
    "CosmosTransformer3DModel": ("transformer_blocks",),
}
_NAMES = {"ZImageTransformer2DModel": "attention", "CosmosTransformer3DModel": "attn2"}


def probabilities(network: str, attn: Any, given: dict[str, Any]) -> Tensor:
    """(B, queries, keys) mean over the heads of one layer's attention."""
    image, text = given["hidden_states"], given.get("encoder_hidden_states")
    heads = attn.num_heads if isinstance(attn, Krea2Attention) else attn.heads
    if hasattr(attn, "to_qkv_mlp_proj"):
        q, k, _ = attn.to_qkv_mlp_proj(image)[..., : 3 * attn.inner_dim].chunk(3, -1)
    else:
        q, k = attn.to_q(image), attn.to_k(text if network == "CosmosTransformer3DModel" else image)
    width = q.shape[-1] // heads
    q, k = attn.norm_q(q.unflatten(-1, (-1, width))), attn.norm_k(k.unflatten(-1, (-1, width)))
    rotary = given.get("image_rotary_emb")
    mask = given.get("attention_mask")
    if network == "QwenImageTransformer2DModel":
        q, k = (apply_rotary_emb_qwen(one, rotary[0], use_real=False) for one in (q, k))
    if text is not None and network != "CosmosTransformer3DModel":
        added = [attn.add_q_proj(text), attn.add_k_proj(text)]
        norms = attn.norm_added_q, attn.norm_added_k
        added = [norm(one.unflatten(-1, (-1, width))) for norm, one in zip(norms, added, strict=True)]
        if network == "QwenImageTransformer2DModel":
            added = [apply_rotary_emb_qwen(one, rotary[1], use_real=False) for one in added]
        pairs = zip(added, (q, k), strict=True)
        last = network == "SD3Transformer2DModel"
        q, k = (torch.cat([own, other] if last else [other, own], 1) for other, own in pairs)
    if network.startswith(("Flux", "Chroma", "Krea2")):
        q, k = (apply_rotary_emb(one, rotary, sequence_dim=1) for one in (q, k))
    if network.startswith("ZImage"):
        turned = given["freqs_cis"].unsqueeze(2)
        q, k = (
            torch.view_as_real(torch.view_as_complex(one.unflatten(-1, (-1, 2))) * turned).flatten(3)
            for one in (q, k)
        )
        mask = None if mask is None else mask[:, None, None]
    if (words := given.get("encoder_hidden_states_mask")) is not None:
        seen = torch.cat([words, torch.ones(image.shape[:2], dtype=torch.bool)], 1)
        mask = seen[:, None, None]
    q, k = q.transpose(1, 2), k.transpose(1, 2).repeat_interleave(heads // k.shape[2], 1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(width)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).mean(1)


@contextmanager
def kept_probabilities(network: nn.Module) -> Iterator[list[Tensor]]:
    """Those of every layer that runs inside the `with` block."""
    kind, kept = type(network).__name__, []

    def keep(attn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(("hidden_states", "encoder_hidden_states"), args, strict=False)), **kwargs}
        if isinstance(given.get("encoder_hidden_states"), tuple):  # Cosmos: text, picture
            given["encoder_hidden_states"] = given["encoder_hidden_states"][0]
        kept.append(probabilities(kind, attn, given))

    layers = [
        getattr(block, _NAMES.get(kind, "attn"))
        for row in LAYERS[kind]
        for block in network.get_submodule(row)
    ]
    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
