"""LoRA key dialects: the only place that knows how files name their matrices.

Understood, for SD 1.x, 2.x and XL: diffusers (`unet.` / `text_encoder.` / `text_encoder_2.` with
`lora_A`/`lora_B`, `lora.down`/`lora.up`, `lora_linear_layer` or `processor.to_q_lora`), PEFT
(`base_model.model.`, with or without an adapter name), kohya and OneTrainer (`lora_unet_*`, `lora_te_*`,
`lora_te1_*`, `lora_te2_*`, `clip_l.`, `clip_g.`, `.alpha`), LDM (`diffusion_model.*`); each with diffusers or
LDM blocks. Besides LoRA: LoCon, LoHa, LoKr, full differences and DoRA (see `lycoris`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .architectures import (
    CLIP_LEAVES,
    RESNET_LEAVES,
    ROOT_MATRICES,
    TEXT_ENCODER,
    TEXT_ENCODER_2,
    UNET,
    UNET_LEAVES,
    ldm_place,
)
from .roles import NOT_LORA, split_role

# LDM names say nothing of levels. All Stable Diffusion UNets have two residual blocks per level; for others
# the names are read again when the network is known (`relocate`).
SD_LAYERS = (2,)

_FLAT = {leaf.replace(".", "_"): leaf for leaf in UNET_LEAVES}
# Old attention processors have a single output matrix.
_UNET_LEAF = {**_FLAT, "attn1_to_out": "attn1.to_out.0", "attn2_to_out": "attn2.to_out.0"}
_CLIP_LEAF = {
    **{leaf.replace(".", "_"): leaf for leaf in CLIP_LEAVES},
    # diffusers' first LoRA of text encoders, and OpenCLIP's own names.
    **{f"self_attn_to_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    "self_attn_to_out": "self_attn.out_proj",
    "attn_out_proj": "self_attn.out_proj",
    "mlp_c_fc": "mlp.fc1",
    "mlp_c_proj": "mlp.fc2",
}
_RESNET_LEAF = {name: name for name in RESNET_LEAVES} | {
    ldm.replace(".", "_"): name for name, ldm in RESNET_LEAVES.items()
}
_ROOT = {name.replace(".", "_"): name for name in ROOT_MATRICES} | {
    ldm.replace(".", "_"): name for name, ldm in ROOT_MATRICES.items()
}
_DIFFUSERS_BLOCK = re.compile(
    r"^(?:(?P<side>down|up)_blocks_(?P<level>\d+)|mid_block)_"
    r"(?P<kind>attentions|resnets|downsamplers|upsamplers)_(?P<position>\d+)_(?P<rest>.+)$"
)
_LDM_BLOCK = re.compile(
    r"^(?:(?P<row>input|output)_blocks_(?P<number>\d+)_\d+|middle_block_(?P<middle>\d+))_(?P<rest>.+)$"
)
_INNER = re.compile(r"^transformer_blocks_(?P<index>\d+)_(?P<leaf>.+)$")
_CLIP_FLAT = re.compile(
    r"^(?:text_model_)?(?:encoder_layers|transformer_resblocks)_(?P<index>\d+)_(?P<leaf>.+)$"
)
# Longest first: "text_encoder_" begins "text_encoder_2_".
_PREFIXES = (
    (
        TEXT_ENCODER_2,
        (
            "lora_te2_",
            "text_encoder_2_",
            "te2_",
            "clip_g_transformer_",
            "clip_g_",
            "conditioner_embedders_1_model_",
        ),
    ),
    (
        TEXT_ENCODER,
        (
            *("lora_te_", "lora_te1_", "text_encoder_", "te_", "te1_", "clip_l_transformer_", "clip_l_"),
            *(
                "cond_stage_model_transformer_",
                "cond_stage_model_model_",
                "conditioner_embedders_0_transformer_",
            ),
        ),
    ),
    (
        UNET,
        ("lora_unet_", "lycoris_unet_", "lycoris_", "unet_", "model_diffusion_model_", "diffusion_model_"),
    ),
)

# Dialects that can be written.
DIALECTS = ("diffusers", "kohya")
# Loaders of every age know the layers of text encoders with this prefix, some without it too.
_LAYERS_PREFIX = "text_model."
_KOHYA_PREFIXES = {UNET: "lora_unet_", TEXT_ENCODER: "lora_te_"}
_KOHYA_XL_PREFIXES = {UNET: "lora_unet_", TEXT_ENCODER: "lora_te1_", TEXT_ENCODER_2: "lora_te2_"}


@dataclass(frozen=True)
class ParsedKey:
    """What a key of a LoRA file means.

    Attributes:
        module: the key without its role suffix; equal for all keys of one matrix.
        role: "down", "up", "alpha", "hada_w1_a" ...; None if the key is refused or unknown.
        network: "unet", "text_encoder", "text_encoder_2" or None.
        matrix: canonical matrix name or None.
        reason: why the key cannot be used; None if it can.
        dialect: who writes keys like this one, in a word or two.
        ldm: (row, number) of the LDM block that the key names; None for diffusers blocks.
    """

    module: str
    role: str | None
    network: str | None
    matrix: str | None
    reason: str | None
    dialect: str = "unknown"
    ldm: tuple[str, int] | None = None


def parse_key(key: str) -> ParsedKey:
    """Read one key of a LoRA file; never fails, an unusable key carries its reason."""
    module, role, refused = split_role(key)
    if role is None and refused is None:
        return ParsedKey(key, None, None, None, NOT_LORA)
    network, flat = _split_prefix(module)
    matrix, ldm = _unet_matrix(flat) if network in (UNET, None) else (None, None)
    if matrix is not None:
        network = UNET
    elif network != UNET:
        matrix = _clip_matrix(flat)
        network = network or (TEXT_ENCODER if matrix else None)
    reason = refused or (_why_not(flat) if matrix is None else None)
    return ParsedKey(module, role, network, matrix, reason, _dialect(key, ldm), ldm)


def relocate(matrix: str, ldm: tuple[str, int], layers: Sequence[int]) -> str:
    """Canonical name of a matrix with LDM block `ldm` in a network with `layers` residual blocks per level.

    Args:
        matrix: its name in a UNet with two residual blocks per level, as `parse_key` gives it.
    """
    _, _, kind, _, *leaf = matrix.split(".")
    block, position, sampled = ldm_place(*ldm, layers)
    # A sampler elsewhere is one of a network with other levels: a name of its own until that is known.
    return ".".join([block, kind, "0" if sampled and kind.endswith("samplers") else str(position), *leaf])


def factor_keys(network: str, matrix: str, dialect: str, *, xl: bool = False) -> dict[str, str]:
    """Keys under which a file holds one matrix; the reverse of `parse_key`.

    Args:
        network: "unet", "text_encoder" or, with `xl`, "text_encoder_2".
        matrix: canonical matrix name.
        dialect: one of `DIALECTS`.
        xl: whether the base has two text encoders; kohya then numbers them.
    Returns:
        role ("down", "up", and "alpha" where the dialect has it) -> key.
    """
    # A text projection stands beside the layers.
    inside = network != UNET and matrix.startswith("encoder.")
    name = f"{_LAYERS_PREFIX if inside else ''}{matrix}"
    if dialect == "kohya":
        prefixes = _KOHYA_XL_PREFIXES if xl else _KOHYA_PREFIXES
        module = f"{prefixes[network]}{name.replace('.', '_')}"
        roles = {"down": "lora_down.weight", "up": "lora_up.weight", "alpha": "alpha"}
    else:
        module = f"{network}.{name}"
        roles = {"down": "lora_A.weight", "up": "lora_B.weight"}
    return {role: f"{module}.{suffix}" for role, suffix in roles.items()}


def _split_prefix(module: str) -> tuple[str | None, str]:
    """(network, name inside it with underscores for dots)."""
    name = module
    while name.startswith(("base_model.model.", "base_model.")):
        name = name.removeprefix("base_model.").removeprefix("model.")
    flat = name.replace(".processor.", ".").replace(".", "_")
    for network, prefixes in _PREFIXES:
        for prefix in prefixes:
            if flat.startswith(prefix):
                return network, flat.removeprefix(prefix)
    return None, flat


def _unet_matrix(flat: str) -> tuple[str | None, tuple[str, int] | None]:
    """(canonical name, LDM block)."""
    if flat in _ROOT:
        return _ROOT[flat], None
    if match := _DIFFUSERS_BLOCK.match(flat):
        leaf = _leaf(match["rest"], {match["kind"]})
        block = f"{match['side']}_blocks.{match['level']}" if match["side"] else "mid_block"
        return (f"{block}.{match['kind']}.{match['position']}.{leaf[1]}" if leaf else None), None
    match = _LDM_BLOCK.match(flat)
    leaf = _leaf(match["rest"], {"attentions", "resnets", "samplers"}) if match else None
    if match is None or leaf is None:
        return None, None
    kind, name = leaf
    if match["middle"]:
        return f"mid_block.{kind}.{int(match['middle']) // 2}.{name}", None
    ldm = match["row"], int(match["number"])
    if ldm == ("input", 0):
        return None, None
    if kind == "samplers":
        kind = "downsamplers" if match["row"] == "input" else "upsamplers"
    return relocate(f"_._.{kind}._.{name}", ldm, SD_LAYERS), ldm


def _leaf(rest: str, kinds: set[str]) -> tuple[str, str] | None:
    """(kind of block, canonical leaf) of what follows a block's name."""
    if "attentions" in kinds:
        if rest in ("proj_in", "proj_out"):
            return "attentions", rest
        inner = _INNER.match(rest)
        if inner and inner["leaf"] in _UNET_LEAF:
            return "attentions", f"transformer_blocks.{inner['index']}.{_UNET_LEAF[inner['leaf']]}"
    if "resnets" in kinds and rest in _RESNET_LEAF:
        return "resnets", _RESNET_LEAF[rest]
    if rest in ("conv", "op") and any(kind.endswith("samplers") for kind in kinds):
        return "samplers", "conv"
    return None


def _clip_matrix(flat: str) -> str | None:
    if flat.removeprefix("text_model_") == "text_projection":
        return "text_projection"
    match = _CLIP_FLAT.match(flat)
    if match is None or match["leaf"] not in _CLIP_LEAF:
        return None
    return f"encoder.layers.{match['index']}.{_CLIP_LEAF[match['leaf']]}"


def _why_not(flat: str) -> str:
    """Reason for a name that is no matrix of a known network."""
    if "in_proj" in flat:
        return "OpenCLIP's fused in_proj is three matrices in one and is not taken apart"
    if re.search(r"(?:^|_)(?:layer_)?norm\d?(?:$|_)|in_layers_0|out_layers_0", flat):
        return "normalisation layers multiply no matrix, so there is nothing to gate"
    if re.search(r"token_embedding|position_embedding", flat):
        return "embedding tables multiply no matrix, so there is nothing to gate"
    return "no matrix of a known network has this name"


def _dialect(key: str, ldm: tuple[str, int] | None) -> str:
    if key.startswith("base_model."):
        name = "PEFT"
    elif re.match(r"lora_(?:unet|te\d?)_", key):
        name = "kohya"
    elif key.startswith(("clip_l.", "clip_g.")):
        name = "OneTrainer"
    elif key.startswith("lycoris_"):
        name = "LyCORIS"
    elif "diffusion_model" in key:
        name = "LDM"
    elif ".processor." in key:
        name = "diffusers, attention processors"
    elif "lora_A" in key or "lora_B" in key:
        name = "diffusers, PEFT keys"
    else:
        name = "diffusers"
    return f"{name}, LDM blocks" if ldm and name != "LDM" else name
