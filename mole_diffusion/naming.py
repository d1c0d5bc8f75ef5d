"""LoRA key dialects: the only place that knows how files name their matrices.

Understood, for SD 1.x and 2.x shapes: diffusers (`unet.` / `text_encoder.` with `lora_A`/`lora_B`,
`lora.down`/`lora.up`, `lora_linear_layer` or `processor.to_q_lora`), PEFT (`base_model.model.`, with or
without an adapter name), kohya (`lora_unet_*`, `lora_te_*`, `.alpha`); each with diffusers or LDM blocks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .architectures import CLIP_LEAVES, TEXT_ENCODER, UNET, UNET_LEAVES

# LDM block names say nothing of levels; all Stable Diffusion UNets have two residual blocks per level.
SD_LAYERS_PER_BLOCK = 2

_ROLES = (
    ("down", re.compile(r"\.(?:lora_A(?:\.[^.]+)?|lora_down|lora\.down|lora_linear_layer\.down)\.weight$")),
    ("up", re.compile(r"\.(?:lora_B(?:\.[^.]+)?|lora_up|lora\.up|lora_linear_layer\.up)\.weight$")),
    ("alpha", re.compile(r"\.alpha$")),
)
_PROCESSOR = re.compile(r"\.processor\.(to_(?:q|k|v|out))_lora\.(down|up)\.weight$")
_DORA = "DoRA is not supported"
_REFUSED = (
    (re.compile(r"\.(?:dora_scale|lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?)$"), _DORA),
    (re.compile(r"\.lora_mid\.weight$"), "LoCon with a middle factor (Tucker form) is not supported"),
    (re.compile(r"\.(?:lora_B(?:\.[^.]+)?|lora_up|lora\.up)\.bias$"), "LoRA biases are not supported"),
    (re.compile(r"\.hada_\w+$"), "LoHa is not supported"),
    (re.compile(r"\.lokr_\w+$"), "LoKr is not supported"),
    (re.compile(r"\.(?:diff|diff_b|w_norm|b_norm)$"), "full weight differences are not supported"),
)

_UNET_LEAF = {leaf.replace(".", "_"): leaf for leaf in UNET_LEAVES}
_CLIP_LEAF = {leaf.replace(".", "_"): leaf for leaf in CLIP_LEAVES}
_UNET_FLAT = re.compile(
    r"^(?:(?P<side>down|up)_blocks_(?P<level>\d+)_attentions_(?P<attention>\d+)"
    r"|(?P<mid>mid_block_attentions_0|middle_block_1)"
    r"|(?P<row>input|output)_blocks_(?P<number>\d+)_1)_"
    r"(?:(?P<outer>proj_in|proj_out)"
    rf"|transformer_blocks_(?P<index>\d+)_(?P<inner>{'|'.join(_UNET_LEAF)}))$"
)
_CLIP_FLAT = re.compile(rf"^(?:text_model_)?encoder_layers_(?P<index>\d+)_(?P<leaf>{'|'.join(_CLIP_LEAF)})$")
_UNET_PREFIXES = ("lora_unet_", "unet.", "model.diffusion_model.", "diffusion_model.")
_TEXT_PREFIXES = ("lora_te_", "lora_te1_", "text_encoder.", "te.")
_SECOND_TEXT_PREFIXES = ("lora_te2_", "text_encoder_2.")

# Dialects that can be written.
DIALECTS = ("diffusers", "kohya")
# Loaders of every age know the text encoder's matrices with this prefix, some without it too.
_WRITTEN_PREFIXES = {UNET: "", TEXT_ENCODER: "text_model."}
_KOHYA_PREFIXES = {UNET: "lora_unet_", TEXT_ENCODER: "lora_te_"}


@dataclass(frozen=True)
class ParsedKey:
    """What a key of a LoRA file means.

    Attributes:
        module: the key without its role suffix; equal for all keys of one matrix.
        role: "down", "up", "alpha"; None if the key is refused or unknown.
        network: "unet", "text_encoder" or None.
        matrix: canonical matrix name or None.
        reason: why the key cannot be used; None if it can.
    """

    module: str
    role: str | None
    network: str | None
    matrix: str | None
    reason: str | None


def parse_key(key: str) -> ParsedKey:
    """Read one key of a LoRA file; never fails, an unusable key carries its reason."""
    module, role, refused = _split_role(key)
    if refused is not None:
        return ParsedKey(module, None, *_locate(module)[:2], refused)
    if role is None:
        return ParsedKey(key, None, None, None, "not a LoRA key of a known dialect")
    network, matrix, reason = _locate(module)
    return ParsedKey(module, role, network, matrix, reason)


def factor_keys(network: str, matrix: str, dialect: str) -> dict[str, str]:
    """Keys under which a file holds one matrix; the reverse of `parse_key`.

    Args:
        network: "unet" or "text_encoder".
        matrix: canonical matrix name.
        dialect: one of `DIALECTS`.
    Returns:
        role ("down", "up", and "alpha" where the dialect has it) -> key.
    """
    name = f"{_WRITTEN_PREFIXES[network]}{matrix}"
    if dialect == "kohya":
        module = f"{_KOHYA_PREFIXES[network]}{name.replace('.', '_')}"
        roles = {"down": "lora_down.weight", "up": "lora_up.weight", "alpha": "alpha"}
    else:
        module = f"{network}.{name}"
        roles = {"down": "lora_A.weight", "up": "lora_B.weight"}
    return {role: f"{module}.{suffix}" for role, suffix in roles.items()}


def _split_role(key: str) -> tuple[str, str | None, str | None]:
    for pattern, reason in _REFUSED:
        match = pattern.search(key)
        if match:
            return key[: match.start()], None, reason
    processor = _PROCESSOR.search(key)
    if processor:
        leaf = "to_out.0" if processor[1] == "to_out" else processor[1]
        return f"{key[: processor.start()]}.{leaf}", processor[2], None
    for role, pattern in _ROLES:
        match = pattern.search(key)
        if match:
            return key[: match.start()], role, None
    return key, None, None


def _locate(module: str) -> tuple[str | None, str | None, str | None]:
    """(network, canonical matrix name, reason it is unusable) of a module name in any dialect."""
    name = module
    while name.startswith(("base_model.model.", "base_model.")):
        name = name.removeprefix("base_model.").removeprefix("model.")
    if name.startswith(_SECOND_TEXT_PREFIXES):
        return None, None, "a second text encoder (SDXL) is not supported"
    network = None
    for candidate, prefixes in ((UNET, _UNET_PREFIXES), (TEXT_ENCODER, _TEXT_PREFIXES)):
        for prefix in prefixes:
            if name.startswith(prefix):
                network, name = candidate, name.removeprefix(prefix)
                break
        if network is not None:
            break
    flat = name.replace(".", "_")
    if network != TEXT_ENCODER:
        matrix = _unet_matrix(flat)
        if matrix is not None:
            return UNET, matrix, None
    if network != UNET:
        matrix = _clip_matrix(flat)
        if matrix is not None:
            return TEXT_ENCODER, matrix, None
    if "resnets" in flat or re.search(r"_(?:in_layers|out_layers|emb_layers|skip_connection)_", flat):
        return network, None, "residual blocks are not mixed; only attention and feed-forward matrices are"
    if re.search(r"conv|samplers|_op$", flat):
        return network, None, "convolutions outside attention blocks are not mixed"
    return network, None, "no matrix of a known network has this name"


def _unet_matrix(flat: str) -> str | None:
    match = _UNET_FLAT.match(flat)
    if match is None:
        return None
    if match["mid"]:
        holder = "mid_block.attentions.0"
    elif match["row"]:
        number = int(match["number"]) - (1 if match["row"] == "input" else 0)
        level, attention = divmod(number, SD_LAYERS_PER_BLOCK + 1)
        holder = f"{'down' if match['row'] == 'input' else 'up'}_blocks.{level}.attentions.{attention}"
    else:
        holder = f"{match['side']}_blocks.{match['level']}.attentions.{match['attention']}"
    if match["outer"]:
        return f"{holder}.{match['outer']}"
    return f"{holder}.transformer_blocks.{match['index']}.{_UNET_LEAF[match['inner']]}"


def _clip_matrix(flat: str) -> str | None:
    match = _CLIP_FLAT.match(flat)
    return f"encoder.layers.{match['index']}.{_CLIP_LEAF[match['leaf']]}" if match else None
