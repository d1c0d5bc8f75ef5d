"""Names of a UNet's matrices: what stands in a block, and what files call it, as diffusers and LDM do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ..base import CONTEXT, Place, Site

# Matrices of one Transformer2DModel / SpatialTransformer in execution order, the layer each belongs to, and
# the tensor each reads: matrices with the same source read the very same tensor.
LEAVES: dict[str, tuple[str, str]] = {
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
OUTER = ("proj_in", "proj_out")
# What diffusers' `fuse_qkv_projections` makes of an attention's matrices.
FUSED = {
    f"{attention}.{fused}": tuple(f"{attention}.{leaf}" for leaf in leaves)
    for attention in ("attn1", "attn2")
    for fused, leaves in (("to_qkv", ("to_q", "to_k", "to_v")), ("to_kv", ("to_k", "to_v")))
}
# Matrices of one residual block in execution order, each with its name in LDM.
RESNET_LEAVES = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# Matrices outside the levels in execution order, each with its name in LDM.
CONV_IN = "conv_in"
ROOT = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    CONV_IN: "input_blocks.0.0",
    "conv_out": "out.2",
}
# LDM names say nothing of levels. All Stable Diffusion UNets have two residual blocks per level; for others
# the names are read again when the network is known.
SD_LAYERS = (2,)

# Names in files, with "_" for ".". Old attention processors have a single output matrix.
_FLAT_LEAF = {leaf.replace(".", "_"): leaf for leaf in (*LEAVES, *FUSED)} | {
    "attn1_to_out": "attn1.to_out.0",
    "attn2_to_out": "attn2.to_out.0",
}
_FLAT_RESNET = {name: name for name in RESNET_LEAVES} | {
    ldm.replace(".", "_"): name for name, ldm in RESNET_LEAVES.items()
}
_FLAT_ROOT = {name.replace(".", "_"): name for name in ROOT} | {
    ldm.replace(".", "_"): name for name, ldm in ROOT.items()
}
_FLAT_BLOCK = re.compile(
    r"^(?:(?P<side>down|up)_blocks_(?P<level>\d+)|mid_block)_"
    r"(?P<kind>attentions|resnets|downsamplers|upsamplers)_(?P<position>\d+)_(?P<rest>.+)$"
)
_FLAT_LDM = re.compile(
    r"^(?:(?P<row>input|output)_blocks_(?P<number>\d+)_\d+|middle_block_(?P<middle>\d+))_(?P<rest>.+)$"
)
_FLAT_INNER = re.compile(r"^transformer_blocks_(?P<index>\d+)_(?P<leaf>.+)$")
# The numbered blocks that a matrix lies in.
BLOCKS = re.compile(
    r"^(?:(?:down|up)_blocks\.\d+\.|mid_block\.)?"
    r"(?:(?:attentions|resnets|downsamplers|upsamplers)\.\d+\.)?(?:transformer_blocks\.\d+\.)?"
)
FLAT_NORM = re.compile(r"in_layers_0|out_layers_0")
_RESNET_NAME = re.compile(r"^down_blocks\.(\d+)\.resnets\.(\d+)\.")


def alternatives(names: Iterable[str]) -> str:
    """A pattern of any of these names."""
    return "|".join(re.escape(name) for name in names)


def read(flat: str, layers: Sequence[int]) -> tuple[Place, ...]:
    """The matrices that a name in a file means in a network with so many residual blocks per level."""
    if flat in _FLAT_ROOT:
        return (Place(_FLAT_ROOT[flat]),)
    if match := _FLAT_BLOCK.match(flat):
        leaf = _leaf(match["rest"], {match["kind"]})
        block = f"{match['side']}_blocks.{match['level']}" if match["side"] else "mid_block"
        return _unfused(f"{block}.{match['kind']}.{match['position']}.", leaf[1]) if leaf else ()
    match = _FLAT_LDM.match(flat)
    leaf = _leaf(match["rest"], {"attentions", "resnets", "samplers"}) if match else None
    if match is None or leaf is None:
        return ()
    kind, name = leaf
    if match["middle"]:
        return _unfused(f"mid_block.{kind}.{int(match['middle']) // 2}.", name, dialect="LDM blocks")
    row, number = match["row"], int(match["number"])
    if (row, number) == ("input", 0):
        return ()
    block, position, sampled = ldm_place(row, number, layers)
    if kind == "samplers":
        kind = "downsamplers" if row == "input" else "upsamplers"
        # A sampler elsewhere is one of a network with other levels: a name of its own until that is known.
        position = 0 if sampled else position
    return _unfused(f"{block}.{kind}.{position}.", name, provisional=True, dialect="LDM blocks")


def layers_of(sites: Iterable[Site]) -> tuple[int, ...]:
    """Residual blocks per level on the way down."""
    found = {(int(m[1]), int(m[2])) for site in sites if (m := _RESNET_NAME.match(site.name))}
    levels = max((level for level, _ in found), default=-1) + 1
    return tuple(sum(level == wanted for level, _ in found) for wanted in range(levels))


def ldm_place(row: str, number: int, layers: Sequence[int]) -> tuple[str, int, bool]:
    """(diffusers block, position in it, whether a sampler belongs there) of an LDM block.

    LDM ends a level with a sampler.

    Args:
        row: "input" or "output".
        number: the LDM block's number; input block 0 is `conv_in` and has no place.
        layers: residual blocks per level on the way down; the last one is repeated for deeper levels. Output
            blocks run through the levels backwards and have one more each.
    """
    rest = number - 1 if row == "input" else number
    sizes = [count + 1 for count in (layers if row == "input" else tuple(reversed(layers)))]
    level = 0
    while rest >= (size := sizes[min(level, len(sizes) - 1)]):
        rest -= size
        level += 1
    return f"{'down' if row == 'input' else 'up'}_blocks.{level}", rest, rest == size - 1


def _leaf(rest: str, kinds: set[str]) -> tuple[str, str] | None:
    """(kind of block, canonical leaf) of what follows a block's name in a file."""
    if "attentions" in kinds:
        if rest in OUTER:
            return "attentions", rest
        inner = _FLAT_INNER.match(rest)
        if inner and inner["leaf"] in _FLAT_LEAF:
            return "attentions", f"transformer_blocks.{inner['index']}.{_FLAT_LEAF[inner['leaf']]}"
    if "resnets" in kinds and rest in _FLAT_RESNET:
        return "resnets", _FLAT_RESNET[rest]
    if rest in ("conv", "op") and any(kind.endswith("samplers") for kind in kinds):
        return "samplers", "conv"
    return None


def _unfused(
    holder: str, leaf: str, *, provisional: bool = False, dialect: str | None = None
) -> tuple[Place, ...]:
    """The places of a leaf under its holder; several for a fused one."""
    stem, _, last = leaf.rpartition("transformer_blocks.")
    index, _, inner = last.partition(".")
    if inner not in FUSED:
        return (Place(f"{holder}{leaf}", None, provisional, dialect),)
    parts = FUSED[inner]
    return tuple(
        Place(
            f"{holder}{stem}transformer_blocks.{index}.{part}", (k, k + 1, len(parts)), provisional, dialect
        )
        for k, part in enumerate(parts)
    )
