"""The networks that experts can be attached to: their blocks, layers, matrices and execution order.

Canonical names are those of diffusers (UNet) and transformers (CLIP text encoder, without the `text_model.`
prefix that older versions carry). LDM-named UNets are mapped onto them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .errors import InjectionError

UNET = "unet"
TEXT_ENCODER = "text_encoder"
PARTS = (UNET, TEXT_ENCODER)

TOKENS = "tokens"
CONTEXT = "context"

# Matrices of one Transformer2DModel / SpatialTransformer in execution order, the layer each belongs to, and
# the tensor each reads: matrices with the same source read the very same tensor.
UNET_LEAVES: dict[str, tuple[str, str]] = {
    "proj_in": ("proj_in", "proj_in"),
    "attn1.to_q": ("attn1", "attn1"),
    "attn1.to_k": ("attn1", "attn1"),
    "attn1.to_v": ("attn1", "attn1"),
    "attn1.to_out.0": ("attn1", "attn1.out"),
    "attn2.to_q": ("attn2", "attn2"),
    "attn2.to_k": ("attn2", CONTEXT),
    "attn2.to_v": ("attn2", CONTEXT),
    "attn2.to_out.0": ("attn2", "attn2.out"),
    "ff.net.0.proj": ("ff", "ff"),
    "ff.net.2": ("ff", "ff.out"),
    "proj_out": ("proj_out", "proj_out"),
}
OUTER_LEAVES = ("proj_in", "proj_out")

# CLIPTextModel registers k, v, q and runs q, k, v.
CLIP_LEAVES: dict[str, tuple[str, str]] = {
    "self_attn.q_proj": ("self_attn", "self_attn"),
    "self_attn.k_proj": ("self_attn", "self_attn"),
    "self_attn.v_proj": ("self_attn", "self_attn"),
    "self_attn.out_proj": ("self_attn", "self_attn.out"),
    "mlp.fc1": ("mlp", "mlp"),
    "mlp.fc2": ("mlp", "mlp.out"),
}


def _alternatives(names: Iterator[str]) -> str:
    return "|".join(re.escape(name) for name in names)


_INNER = _alternatives(leaf for leaf in UNET_LEAVES if leaf not in OUTER_LEAVES)
_UNET_MATRIX = re.compile(
    r"^(?P<prefix>(?:.*\.)?)(?P<holder>(?:down_blocks|up_blocks)\.\d+\.attentions\.\d+|mid_block\.attentions\.\d+"
    r"|(?:input_blocks|output_blocks)\.\d+\.\d+|middle_block\.\d+)\."
    rf"(?:(?P<outer>proj_in|proj_out)|transformer_blocks\.(?P<index>\d+)\.(?P<inner>{_INNER}))$"
)
_CLIP_MATRIX = re.compile(
    r"^(?P<prefix>(?:(?:.*\.)?text_model\.)?)encoder\.layers\.(?P<index>\d+)\."
    rf"(?P<leaf>{_alternatives(iter(CLIP_LEAVES))})$"
)
_DIFFUSERS_HOLDER = re.compile(r"^(?:(down|up)_blocks\.(\d+)|(mid)_block)\.attentions\.(\d+)$")
_LDM_CHILD = re.compile(r"^(?:.*\.)?(input|output)_blocks\.(\d+)\.\d+$")
_SECTIONS = {"down": 0, "mid": 1, "up": 2}


@dataclass(frozen=True)
class MatrixSite:
    """One matrix of a network.

    Attributes:
        name: canonical dotted name.
        path: dotted path of the module inside the network (a PEFT wrapper keeps the path of what it wraps).
        block: canonical name of the transformer block. `proj_in` and `proj_out` belong to the nearest one.
        layer: canonical name of the attention or feed-forward layer.
        block_path, layer_path: paths of those modules; None for `proj_in` and `proj_out`, which lie outside.
        stream: "tokens" (a UNet's image tokens, a text encoder's tokens) or "context" (a UNet's text tokens).
        source: matrices of equal source read the same tensor.
        depth: number of halvings between the latent and the image tokens.
        order: sort key of execution.
    """

    name: str
    path: str
    block: str
    layer: str
    block_path: str | None
    layer_path: str | None
    stream: str
    source: str
    depth: int
    order: tuple[int, ...]


@dataclass(frozen=True)
class NetworkMap:
    """The matrices of a network in execution order."""

    part: str
    sites: tuple[MatrixSite, ...]


def map_network(network: nn.Module, part: str | None = None) -> NetworkMap:
    """Find the matrices of a network.

    Args:
        network: diffusers UNet, LDM-named UNet or CLIP text encoder.
        part: "unet" or "text_encoder"; None to tell from the names.
    Raises:
        InjectionError: the part is unknown, or the network has no matrices of that part.
    """
    if part is not None and part not in PARTS:
        raise InjectionError(f"part={part!r} is not allowed; choose one of {', '.join(PARTS)}.")
    paths = [path for path, _ in network.named_modules()]
    for candidate in PARTS if part is None else (part,):
        sites = _unet_sites(network, paths) if candidate == UNET else _clip_sites(paths)
        if sites:
            return NetworkMap(candidate, tuple(sorted(sites, key=lambda site: site.order)))
    wanted = part or " or ".join(PARTS)
    raise InjectionError(
        f"{type(network).__name__} has no matrices of a known {wanted}; looked for names such as "
        "'down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q', "
        "'input_blocks.1.1.transformer_blocks.0.attn1.to_q' or 'encoder.layers.0.self_attn.q_proj'."
    )


def _clip_sites(paths: list[str]) -> list[MatrixSite]:
    leaves = list(CLIP_LEAVES)
    sites = []
    for path in paths:
        match = _CLIP_MATRIX.match(path)
        if match is None:
            continue
        block = f"encoder.layers.{match['index']}"
        layer, source = CLIP_LEAVES[match["leaf"]]
        prefix = match["prefix"]
        sites.append(
            MatrixSite(
                name=f"{block}.{match['leaf']}",
                path=path,
                block=block,
                layer=f"{block}.{layer}",
                block_path=f"{prefix}{block}",
                layer_path=f"{prefix}{block}.{layer}",
                stream=TOKENS,
                source=f"{block}.{source}",
                depth=0,
                order=(int(match["index"]), leaves.index(match["leaf"])),
            )
        )
    return sites


def _unet_sites(network: nn.Module, paths: list[str]) -> list[MatrixSite]:
    matches = [(path, match) for path in paths if (match := _UNET_MATRIX.match(path))]
    if not matches:
        return []
    holders = _ldm_holders(network, paths)
    levels = _count_levels(paths, holders)
    last_block: dict[str, int] = {}
    for _, match in matches:
        holder = match["holder"]
        last_block[holder] = max(last_block.get(holder, 0), int(match["index"] or 0))
    return [_unet_site(path, match, holders, last_block[match["holder"]], levels) for path, match in matches]


def _unet_site(
    path: str, match: re.Match[str], holders: dict[str, str], last_block: int, levels: int
) -> MatrixSite:
    name = holders.get(match["holder"], match["holder"])
    section, level, attention = _holder_order(name)
    leaf = match["outer"] or match["inner"]
    outer = match["outer"] is not None
    index = (0 if leaf == "proj_in" else last_block) if outer else int(match["index"])
    block = f"{name}.transformer_blocks.{index}"
    layer, source = UNET_LEAVES[leaf]
    inside = f"{match['prefix']}{match['holder']}.transformer_blocks.{index}"
    return MatrixSite(
        name=f"{name}.{leaf}" if outer else f"{block}.{leaf}",
        path=path,
        block=block,
        layer=f"{name}.{layer}" if outer else f"{block}.{layer}",
        block_path=None if outer else inside,
        layer_path=None if outer else f"{inside}.{layer}",
        stream=CONTEXT if source == CONTEXT else TOKENS,
        source=f"{block}.{source}",
        depth=(level, levels, levels - level)[section],
        order=(section, level, attention, index, list(UNET_LEAVES).index(leaf)),
    )


def _holder_order(name: str) -> tuple[int, int, int]:
    """(section, level, attention) of a canonical Transformer2DModel name; sorts in execution order."""
    match = _DIFFUSERS_HOLDER.match(name)
    if match is None:  # the pattern of `_UNET_MATRIX` and the LDM walk produce only such names
        raise InjectionError(f"{name!r} is not the name of an attention block of a UNet.")
    return _SECTIONS[match[1] or match[3]], int(match[2] or 0), int(match[4])


def _count_levels(paths: list[str], holders: dict[str, str]) -> int:
    """Index of the deepest level, counted in halvings."""
    if holders:
        return max(int(m[1]) for name in holders.values() if (m := re.match(r"up_blocks\.(\d+)", name)))
    downs = [int(m[1]) for path in paths if (m := re.match(r"^(?:.*\.)?down_blocks\.(\d+)$", path))]
    return max(downs, default=0)


def _ldm_holders(network: nn.Module, paths: list[str]) -> dict[str, str]:
    """LDM module name -> diffusers name, for every child of the input, middle and output blocks.

    LDM counts all blocks of a section in one row and ends a level with a Downsample or Upsample;
    diffusers counts attentions within a level.
    """
    rows: dict[str, dict[int, list[str]]] = {"input": {}, "output": {}}
    middle: dict[str, str] = {}
    for path in paths:
        match = _LDM_CHILD.match(path)
        if match:
            rows[match[1]].setdefault(int(match[2]), []).append(path)
        elif found := re.match(r"^(?:.*\.)?(middle_block\.\d+)$", path):
            middle[found[1]] = "mid_block.attentions.0"
    if not rows["input"]:
        return {}
    holders = dict(middle)
    for section, target, skip in (("input", "down_blocks", 1), ("output", "up_blocks", 0)):
        level = position = 0
        for index in sorted(rows[section])[skip:]:
            kinds = [type(network.get_submodule(path)).__name__ for path in rows[section][index]]
            resamples = any(kind.startswith(("Downsample", "Upsample")) for kind in kinds)
            if section == "output" or not resamples:
                for path in rows[section][index]:
                    local = path[path.index(f"{section}_blocks.") :]
                    holders[local] = f"{target}.{level}.attentions.{position}"
                position += 1
            if resamples:
                level, position = level + 1, 0
    return holders
