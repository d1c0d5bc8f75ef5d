"""Names of matrices in networks that no architecture here describes, to say what a file is for.

The patterns are of names in files with "_" for ".", with or without a prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from .families import (
    ANIMA,
    CHROMA,
    FLUX1,
    FLUX2,
    HIDREAM,
    HUNYUAN_VIDEO,
    KREA2,
    LUMINA2,
    QWEN_IMAGE,
    SD3,
    WAN,
    Z_IMAGE,
)

# In the order in which they are asked: names that several families have stand with the last of them.
_NAMES = (
    (CHROMA, r"distilled_guidance_layer"),
    (FLUX2, r"(?:double|single)_stream_modulation|to_qkv_mlp_proj|time_guidance_embed"),
    (HUNYUAN_VIDEO, r"(?:img|txt)_mlp_fc\d|token_refiner"),
    (KREA2, r"text_fusion|transformer_blocks_\d+_attn_to_gate|(?:^|_)blocks_\d+_attn_w[qkvo]$"),
    (HIDREAM, r"(?:double|single)_stream_blocks_\d+_"),
    (QWEN_IMAGE, r"transformer_blocks_\d+_(?:img|txt)_m(?:lp|od)_"),
    (FLUX1, r"(?:^|_)(?:double|single)_blocks_\d+_|single_transformer_blocks_\d+_"),
    (
        SD3,
        r"joint_blocks_\d+_|transformer_blocks_\d+_(?:norm1_context|ff_context|attn_add_[qkv]|attn_to_add)",
    ),
    (
        Z_IMAGE,
        r"(?:refiner|layers)_\d+_(?:attention_(?:to_|qkv|out)|adaLN|feed_forward_w)",
    ),
    (LUMINA2, r"(?:refiner|layers)_\d+_(?:attn_to_|feed_forward_linear)"),
    (ANIMA, r"llm_adapter|(?:^|_)blocks_\d+_(?:self|cross)_attn_(?:[qkv]|output)_proj$"),
    (WAN, r"(?:^|_)blocks_\d+_(?:(?:self|cross)_attn_[qkvo]|ffn_[02])(?:_img)?$"),
    ("T5", r"encoder_block_\d+_layer_\d+_(?:SelfAttention|DenseReluDense)_"),
)
_PATTERNS = tuple((family, re.compile(pattern)) for family, pattern in _NAMES)


def foreign_family(names: Iterable[str]) -> str | None:
    """The family whose networks have these names; None if they are no known family's.

    Args:
        names: names of matrices in a file that no architecture here reads.
    """
    listed = list(names)
    return next((family for family, one in _PATTERNS if any(one.search(name) for name in listed)), None)
