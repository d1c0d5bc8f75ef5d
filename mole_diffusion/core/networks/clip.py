"""CLIP text encoders, under the names of transformers; files may have OpenCLIP's.

Canonical names have no `text_model.`, which older versions of transformers put before the layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError
from .base import EMBEDDING, ENCODER, TOKENS, Base, Forward
from .families import SDXL
from .stacks import Blocks, Leaf, Stack

#: What hosts, and gates files, call a base's text encoder, and the second one.
TEXT_ENCODER = "text_encoder"
TEXT_ENCODER_2 = "text_encoder_2"
#: Tokens of a text.
TOKENS_OF_A_TEXT = 77
#: What files call the vectors of a bundled embedding, as patterns -> slot of their encoder: with one encoder,
#: and with two.
EMBEDDING_SLOTS = {
    r"string_to_param\.[^.]+": TEXT_ENCODER,
    "emb_params": TEXT_ENCODER,
    "clip_l": TEXT_ENCODER,
    "clip_g": TEXT_ENCODER_2,
}


# Of the bases with a second CLIP text encoder.
_BASES = {TEXT_ENCODER_2: Base(SDXL, None)}


def _read(args: tuple[Any, ...], kwargs: Mapping[str, Any], given: tuple[int, int] | None) -> Forward:
    """(token ids (B, L), attention mask (B, L) or None)."""
    mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    ids = args[0] if args else kwargs.get("input_ids")
    return Forward(
        masks={TOKENS: mask} if isinstance(mask, Tensor) and mask.dim() == 2 else {},
        ids=ids if isinstance(ids, Tensor) and ids.dim() == 2 else None,
    )


def _count(network: nn.Module, stream: str, given: tuple[int, int] | int | None) -> int:
    if given is not None and not isinstance(given, int):
        raise ConfigError(f"flatten_tokens={given!r} is not allowed for a text encoder; give one number.")
    return given or TOKENS_OF_A_TEXT


CLIP = Stack(
    name="clip",
    role=ENCODER,
    slots=(TEXT_ENCODER, TEXT_ENCODER_2),
    prefixes={
        TEXT_ENCODER: (
            *("lora_te_", "lora_te1_", "text_encoder_", "te_", "te1_", "clip_l_transformer_", "clip_l_"),
            *(
                "cond_stage_model_transformer_",
                "cond_stage_model_model_",
                "conditioner_embedders_0_transformer_",
            ),
        ),
        TEXT_ENCODER_2: (
            *("lora_te2_", "text_encoder_2_", "te2_", "clip_g_transformer_", "clip_g_"),
            "conditioner_embedders_1_model_",
        ),
    },
    blocks=(
        Blocks(
            "encoder.layers",
            # CLIPTextModel registers k, v, q and runs q, k, v.
            (
                Leaf("self_attn.q_proj", source="self_attn"),
                Leaf("self_attn.k_proj", source="self_attn"),
                Leaf("self_attn.v_proj", source="self_attn"),
                Leaf("self_attn.out_proj"),
                Leaf("mlp.fc1"),
                Leaf("mlp.fc2"),
            ),
            written=("transformer.resblocks",),
            names={
                # diffusers' first LoRA of text encoders, and OpenCLIP.
                **{f"self_attn.to_{x}": f"self_attn.{x}_proj" for x in "qkv"},
                "self_attn.to_out": "self_attn.out_proj",
                "attn.in_proj": {f"self_attn.{x}_proj": 1 for x in "qkv"},
                "attn.out_proj": "self_attn.out_proj",
                "mlp.c_fc": "mlp.fc1",
                "mlp.c_proj": "mlp.fc2",
            },
        ),
    ),
    after=(Leaf("text_projection", EMBEDDING, identifies=False),),
    wrapper="text_model",
    inputs=_read,
    counter=_count,
    kohya={TEXT_ENCODER: ("lora_te_", "lora_te1_"), TEXT_ENCODER_2: ("lora_te2_", "lora_te2_")},
    writers={"clip_l.": "OneTrainer", "clip_g.": "OneTrainer"},
    tell=lambda slot, inputs: _BASES.get(slot),
)
