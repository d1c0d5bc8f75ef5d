"""The networks that experts can be attached to: their blocks, layers, matrices and execution order.

Canonical names are those of diffusers (UNet) and transformers (CLIP text encoder, without the `text_model.`
prefix that older versions carry). LDM-named UNets are mapped onto them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from .errors import InjectionError

UNET = "unet"
TEXT_ENCODER = "text_encoder"
TEXT_ENCODER_2 = "text_encoder_2"
PARTS = (UNET, TEXT_ENCODER, TEXT_ENCODER_2)

TOKENS = "tokens"
CONTEXT = "context"
# One row per picture: the embedding of the timestep, the pooled text.
EMBEDDING = "embedding"

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

# Matrices of one residual block in execution order, each with its name in LDM.
RESNET_LEAVES = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# Matrices outside the levels of a UNet in execution order, each with its name in LDM.
ROOT_MATRICES = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
}

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
_PREFIX = r"^(?P<prefix>(?:.*\.)?)"
_UNET_ATTENTION = re.compile(
    rf"{_PREFIX}(?P<holder>(?:down_blocks|up_blocks)\.\d+\.attentions\.\d+|mid_block\.attentions\.\d+"
    r"|(?:input_blocks|output_blocks)\.\d+\.\d+|middle_block\.\d+)\."
    rf"(?:(?P<outer>proj_in|proj_out)|transformer_blocks\.(?P<index>\d+)\.(?P<inner>{_INNER}))$"
)
_UNET_RESIDUAL = re.compile(
    rf"{_PREFIX}(?P<holder>(?:down_blocks|up_blocks)\.\d+\.resnets\.\d+|mid_block\.resnets\.\d+"
    r"|(?:input_blocks|output_blocks)\.\d+\.0|middle_block\.[02])\."
    rf"(?P<leaf>{_alternatives(iter((*RESNET_LEAVES, *RESNET_LEAVES.values())))})$"
)
_UNET_SAMPLER = re.compile(
    rf"{_PREFIX}(?P<holder>down_blocks\.\d+\.downsamplers\.0|up_blocks\.\d+\.upsamplers\.0"
    r"|input_blocks\.\d+\.0|output_blocks\.\d+\.[12])\.(?P<leaf>conv|op)$"
)
_UNET_ROOT = re.compile(
    rf"{_PREFIX}(?P<name>{_alternatives(iter((*ROOT_MATRICES, *ROOT_MATRICES.values())))})$"
)
_CLIP_MATRIX = re.compile(
    r"^(?P<prefix>(?:(?:.*\.)?text_model\.)?)encoder\.layers\.(?P<index>\d+)\."
    rf"(?P<leaf>{_alternatives(iter(CLIP_LEAVES))})$"
)
_DIFFUSERS_PLACE = re.compile(r"^((?:down|up)_blocks\.\d+|mid_block)\.\w+\.(\d+)$")
_LDM_CHILD = re.compile(r"^(?:.*\.)?(input|output)_blocks\.(\d+)\.\d+$")
_SECTIONS = {"down": 0, "mid": 1, "up": 2}
# Sections of what runs before and after the levels.
_BEFORE, _AFTER = -1, 3
# Samplers run after all residual blocks of their level.
_LAST = 1_000

ATTENTION = "attention"
RESIDUAL = "residual"


@dataclass(frozen=True)
class MatrixSite:
    """One matrix of a network.

    Attributes:
        name: canonical dotted name.
        path: dotted path of the module inside the network (a PEFT wrapper keeps the path of what it wraps).
        block: canonical name of the transformer block, or of the residual block or sampler for those outside.
            `proj_in` and `proj_out` belong to the nearest transformer block.
        layer: canonical name of the attention or feed-forward layer, or of the residual block.
        block_path, layer_path: paths of those modules; None for matrices outside transformer blocks.
        stream: "tokens" (a UNet's image tokens, a text encoder's tokens), "context" (a UNet's text tokens) or
            "embedding" (one row per picture).
        source: matrices of equal source read the same tensor.
        depth: number of halvings between the latent and the tokens that the matrix writes.
        order: sort key of execution.
        kind: "attention" for transformers with their `proj_in` and `proj_out`, "residual" for the rest.
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
    kind: str = ATTENTION


@dataclass(frozen=True)
class NetworkMap:
    """The matrices of a network in execution order.

    Attributes:
        part: "unet", "text_encoder" or "text_encoder_2".
        sites: the matrices.
        layers: residual blocks per level on the way down (empty for a text encoder).
    """

    part: str
    sites: tuple[MatrixSite, ...]
    layers: tuple[int, ...] = ()


def map_network(network: nn.Module, part: str | None = None) -> NetworkMap:
    """Find the matrices of a network.

    Args:
        network: diffusers UNet, LDM-named UNet or CLIP text encoder.
        part: "unet", "text_encoder" or "text_encoder_2"; None to tell from the names (never the last one).
    Raises:
        InjectionError: the part is unknown, or the network has no matrices of that part.
    """
    if part is not None and part not in PARTS:
        raise InjectionError(f"part={part!r} is not allowed; choose one of {', '.join(PARTS)}.")
    paths = [path for path, _ in network.named_modules()]
    for candidate in PARTS if part is None else (part,):
        sites, layers = _unet_sites(network, paths) if candidate == UNET else (_clip_sites(paths), ())
        if any(site.kind == ATTENTION for site in sites):
            return NetworkMap(candidate, tuple(sorted(sites, key=lambda site: site.order)), layers)
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
    if sites and "text_projection" in paths:
        sites.append(
            MatrixSite(
                name="text_projection",
                path="text_projection",
                block="text_projection",
                layer="text_projection",
                block_path=None,
                layer_path=None,
                stream=EMBEDDING,
                source="text_projection",
                depth=0,
                order=(_LAST,),
                kind=RESIDUAL,
            )
        )
    return sites


def ldm_place(row: str, number: int, layers: Sequence[int]) -> tuple[str, int, bool]:
    """(diffusers block, position in it, whether a sampler belongs there) of an LDM block.

    LDM counts all blocks of a section in one row and ends a level with a sampler; diffusers counts within a
    level.

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


def _unet_sites(network: nn.Module, paths: list[str]) -> tuple[list[MatrixSite], tuple[int, ...]]:
    """All matrices of a UNet, and its residual blocks per level."""
    attentions = [match for path in paths if (match := _UNET_ATTENTION.match(path))]
    if not attentions:
        return [], ()
    places = _ldm_places(network, paths) or _diffusers_places(paths)
    down = [int(m[1]) for block, _ in places.values() if (m := re.match(r"down_blocks\.(\d+)$", block))]
    levels = max(down, default=0)
    residuals = {
        place
        for path in paths
        if (match := _UNET_RESIDUAL.match(path)) and (place := places[match["holder"]])[0].startswith("down")
    }
    layers = tuple(
        sum(block == f"down_blocks.{level}" for block, _ in residuals) for level in range(levels + 1)
    )
    last_block: dict[str, int] = {}
    for match in attentions:
        holder = match["holder"]
        last_block[holder] = max(last_block.get(holder, 0), int(match["index"] or 0))
    sites = [
        _attention_site(match, places[match["holder"]], last_block[match["holder"]], levels)
        for match in attentions
    ]
    # An identity in place of a skip connection has no weight.
    weighted = [
        path
        for path in paths
        if any(hasattr(network.get_submodule(path), name) for name in ("weight", "base_layer"))
    ]
    for path in weighted:
        site = _residual_site(path, places, levels) or _root_site(path, levels)
        if site is not None:
            sites.append(site)
    return sites, layers


def _place_order(block: str, levels: int) -> tuple[int, int, int]:
    """(section, level, depth) of a diffusers block."""
    section, _, level = block.partition("_blocks.")
    if not level:
        return _SECTIONS["mid"], 0, levels
    number = int(level)
    return _SECTIONS[section], number, number if section == "down" else levels - number


def _attention_site(match: re.Match[str], place: tuple[str, int], last_block: int, levels: int) -> MatrixSite:
    section, level, depth = _place_order(place[0], levels)
    name = f"{place[0]}.attentions.{place[1]}"
    leaf = match["outer"] or match["inner"]
    outer = match["outer"] is not None
    index = (0 if leaf == "proj_in" else last_block) if outer else int(match["index"])
    block = f"{name}.transformer_blocks.{index}"
    layer, source = UNET_LEAVES[leaf]
    inside = f"{match['prefix']}{match['holder']}.transformer_blocks.{index}"
    return MatrixSite(
        name=f"{name}.{leaf}" if outer else f"{block}.{leaf}",
        path=match.string,
        block=block,
        layer=f"{name}.{layer}" if outer else f"{block}.{layer}",
        block_path=None if outer else inside,
        layer_path=None if outer else f"{inside}.{layer}",
        stream=CONTEXT if source == CONTEXT else TOKENS,
        source=f"{block}.{source}",
        depth=depth,
        order=(section, level, place[1], 1, index, list(UNET_LEAVES).index(leaf)),
    )


def _residual_site(path: str, places: Mapping[str, tuple[str, int]], levels: int) -> MatrixSite | None:
    """The site of a matrix of a residual block or a sampler, which is a block of its own; None for others."""
    residual, sampler = _UNET_RESIDUAL.match(path), _UNET_SAMPLER.match(path)
    match = residual or sampler
    if match is None:
        return None
    block, position = places[match["holder"]]
    section, level, depth = _place_order(block, levels)
    if residual is not None:
        leaf = {ldm: name for name, ldm in RESNET_LEAVES.items()}.get(match["leaf"], match["leaf"])
        holder, order = f"{block}.resnets.{position}", (position, 0, 0, list(RESNET_LEAVES).index(leaf))
    else:
        leaf, down = "conv", section == _SECTIONS["down"]
        holder, order = f"{block}.{'down' if down else 'up'}samplers.0", (_LAST, 0, 0, 0)
        depth += 1 if down else -1
    return _plain_site(
        f"{holder}.{leaf}",
        path,
        holder,
        EMBEDDING if leaf == "time_emb_proj" else TOKENS,
        depth,
        (section, level, *order),
    )


def _root_site(path: str, levels: int) -> MatrixSite | None:
    """The site of a matrix outside all levels; None for others."""
    match = _UNET_ROOT.match(path)
    if match is None:
        return None
    name = {ldm: name for name, ldm in ROOT_MATRICES.items()}.get(match["name"], match["name"])
    section = _AFTER if name == "conv_out" else _BEFORE
    order = (section, list(ROOT_MATRICES).index(name))
    embedding = name.partition(".")[0]
    return _plain_site(name, path, embedding, TOKENS if name == embedding else EMBEDDING, 0, order)


def _plain_site(
    name: str, path: str, block: str, stream: str, depth: int, order: tuple[int, ...]
) -> MatrixSite:
    return MatrixSite(name, path, block, block, None, None, stream, name, depth, order, RESIDUAL)


def _diffusers_places(paths: list[str]) -> dict[str, tuple[str, int]]:
    """Name of every child of a block -> (block, position)."""
    places = {}
    for path in paths:
        local = re.sub(r"^(?:.*\.)?(?=(?:down_blocks|up_blocks|mid_block)\.)", "", path)
        if match := _DIFFUSERS_PLACE.match(local):
            places[local] = match[1], int(match[2])
    return places


def _ldm_places(network: nn.Module, paths: list[str]) -> dict[str, tuple[str, int]]:
    """LDM name of every child of the input, middle and output blocks -> (diffusers block, position).

    Read off the modules: a level ends with a Downsample or Upsample, however many blocks it has.
    """
    rows: dict[str, dict[int, list[str]]] = {"input": {}, "output": {}}
    places: dict[str, tuple[str, int]] = {}
    for path in paths:
        if match := _LDM_CHILD.match(path):
            rows[match[1]].setdefault(int(match[2]), []).append(path)
        elif found := re.match(r"^(?:.*\.)?(middle_block\.(\d+))$", path):
            places[found[1]] = "mid_block", int(found[2]) // 2
    if not rows["input"]:
        return {}
    for section, target, skip in (("input", "down_blocks", 1), ("output", "up_blocks", 0)):
        level = position = 0
        for index in sorted(rows[section])[skip:]:
            kinds = [type(network.get_submodule(path)).__name__ for path in rows[section][index]]
            for path in rows[section][index]:
                places[path[path.index(f"{section}_blocks.") :]] = f"{target}.{level}", position
            position += 1
            if any(kind.startswith(("Downsample", "Upsample")) for kind in kinds):
                level, position = level + 1, 0
    return places
