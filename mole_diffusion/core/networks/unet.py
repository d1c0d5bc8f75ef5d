"""UNets of Stable Diffusion 1.x, 2.x and XL: levels, names of diffusers and of LDM, tokens by halving.

Canonical names are those of diffusers. LDM counts all blocks of a side in one row and diffusers within a
level, so what an LDM name means depends on the network's residual blocks per level.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError
from ..modules import base_layer, matrix_shape
from .base import ATTENTION, CONTEXT, DENOISER, EMBEDDING, RESIDUAL, TOKENS, Base, Forward, Place, Role, Site
from .clip import TOKENS_OF_A_TEXT
from .families import SD1, SD2, SDXL, SDXL_REFINER

#: What hosts, and gate files, call a UNet.
UNET = "unet"

# Matrices of one Transformer2DModel / SpatialTransformer in execution order, the layer each belongs to, and
# the tensor each reads: matrices with the same source read the very same tensor.
_LEAVES: dict[str, tuple[str, str]] = {
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
_OUTER = ("proj_in", "proj_out")
# What diffusers' `fuse_qkv_projections` makes of an attention's matrices.
_FUSED = {
    f"{attention}.{fused}": tuple(f"{attention}.{leaf}" for leaf in leaves)
    for attention in ("attn1", "attn2")
    for fused, leaves in (("to_qkv", ("to_q", "to_k", "to_v")), ("to_kv", ("to_k", "to_v")))
}
# Matrices of one residual block in execution order, each with its name in LDM.
_RESNET_LEAVES = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# Matrices outside the levels in execution order, each with its name in LDM.
_CONV_IN = "conv_in"
_ROOT = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    _CONV_IN: "input_blocks.0.0",
    "conv_out": "out.2",
}
# LDM names say nothing of levels. All Stable Diffusion UNets have two residual blocks per level; for others
# the names are read again when the network is known.
_SD_LAYERS = (2,)
# The width of the text that the cross-attention reads tells the families apart.
_FAMILY_OF_WIDTH = {768: SD1, 1024: SD2, 1280: SDXL_REFINER, 2048: SDXL}
_TEXT_LEAVES = (".attn2.to_k", ".attn2.to_v")
# Halvings of the latent at most.
_MAX_DEPTH = 8
# Steps of the diffusion that the timestep counts.
_STEPS = 1000.0


def _alternatives(names: Iterable[str]) -> str:
    return "|".join(re.escape(name) for name in names)


_INNER = _alternatives(leaf for leaf in (*_LEAVES, *_FUSED) if leaf not in _OUTER)
_PREFIX = r"^(?P<prefix>(?:.*\.)?)"
_ATTENTION = re.compile(
    rf"{_PREFIX}(?P<holder>(?:down_blocks|up_blocks)\.\d+\.attentions\.\d+|mid_block\.attentions\.\d+"
    r"|(?:input_blocks|output_blocks)\.\d+\.\d+|middle_block\.\d+)\."
    rf"(?:(?P<outer>proj_in|proj_out)|transformer_blocks\.(?P<index>\d+)\.(?P<inner>{_INNER}))$"
)
_RESIDUAL = re.compile(
    rf"{_PREFIX}(?P<holder>(?:down_blocks|up_blocks)\.\d+\.resnets\.\d+|mid_block\.resnets\.\d+"
    r"|(?:input_blocks|output_blocks)\.\d+\.0|middle_block\.[02])\."
    rf"(?P<leaf>{_alternatives((*_RESNET_LEAVES, *_RESNET_LEAVES.values()))})$"
)
_SAMPLER = re.compile(
    rf"{_PREFIX}(?P<holder>down_blocks\.\d+\.downsamplers\.0|up_blocks\.\d+\.upsamplers\.0"
    r"|input_blocks\.\d+\.0|output_blocks\.\d+\.[12])\.(?P<leaf>conv|op)$"
)
_ROOT_PATH = re.compile(rf"{_PREFIX}(?P<name>{_alternatives((*_ROOT, *_ROOT.values()))})$")
_PLACE = re.compile(r"^((?:down|up)_blocks\.\d+|mid_block)\.\w+\.(\d+)$")
_RESNET_NAME = re.compile(r"^down_blocks\.(\d+)\.resnets\.(\d+)\.")
_LDM_CHILD = re.compile(r"^(?:.*\.)?(input|output)_blocks\.(\d+)\.\d+$")
_SECTIONS = {"down": 0, "mid": 1, "up": 2}
# Sections of what runs before and after the levels.
_BEFORE, _AFTER = -1, 3
# Samplers run after all residual blocks of their level.
_LAST = 1_000

# Names in files, with "_" for ".". Old attention processors have a single output matrix.
_FLAT_LEAF = {leaf.replace(".", "_"): leaf for leaf in (*_LEAVES, *_FUSED)} | {
    "attn1_to_out": "attn1.to_out.0",
    "attn2_to_out": "attn2.to_out.0",
}
_FLAT_RESNET = {name: name for name in _RESNET_LEAVES} | {
    ldm.replace(".", "_"): name for name, ldm in _RESNET_LEAVES.items()
}
_FLAT_ROOT = {name.replace(".", "_"): name for name in _ROOT} | {
    ldm.replace(".", "_"): name for name, ldm in _ROOT.items()
}
_FLAT_BLOCK = re.compile(
    r"^(?:(?P<side>down|up)_blocks_(?P<level>\d+)|mid_block)_"
    r"(?P<kind>attentions|resnets|downsamplers|upsamplers)_(?P<position>\d+)_(?P<rest>.+)$"
)
_FLAT_LDM = re.compile(
    r"^(?:(?P<row>input|output)_blocks_(?P<number>\d+)_\d+|middle_block_(?P<middle>\d+))_(?P<rest>.+)$"
)
_FLAT_INNER = re.compile(r"^transformer_blocks_(?P<index>\d+)_(?P<leaf>.+)$")
_FLAT_NORM = re.compile(r"in_layers_0|out_layers_0")


@dataclass(frozen=True, eq=False)
class UNetSite(Site):
    """One matrix of a UNet.

    Attributes:
        depth: number of halvings between the latent and the tokens that the matrix writes.
    """

    depth: int = 0


class UNet:
    """UNets of Stable Diffusion, under the names of diffusers or LDM."""

    name = UNET
    role: Role = DENOISER
    slots = (UNET,)
    prefixes: Mapping[str, Sequence[str]] = {
        UNET: (
            *("lora_unet_", "lycoris_unet_", "lycoris_", "unet_"),
            *("model_diffusion_model_", "diffusion_model_"),
        )
    }
    families = tuple(_FAMILY_OF_WIDTH.values())
    example = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    text_gates = False

    def sites(self, network: nn.Module) -> tuple[Site, ...]:
        """See `Architecture`; where projections are fused, the fused modules' rows."""
        paths = [path for path, _ in network.named_modules()]
        attentions = [match for path in paths if (match := _ATTENTION.match(path))]
        if not attentions:
            return ()
        places = _ldm_places(network, paths) or _diffusers_places(paths)
        down = [int(m[1]) for block, _ in places.values() if (m := re.match(r"down_blocks\.(\d+)$", block))]
        levels = max(down, default=0)
        last_block: dict[str, int] = {}
        for match in attentions:
            holder = match["holder"]
            last_block[holder] = max(last_block.get(holder, 0), int(match["index"] or 0))
        sites = [
            _attention_site(match, leaf, rows, places[match["holder"]], last_block[match["holder"]], levels)
            for match, leaf, rows in _running(network, attentions)
        ]
        for path in paths:
            if _weighted(network.get_submodule(path)):
                site = _residual_site(path, places, levels) or _root_site(path)
                if site is not None:
                    sites.append(site)
        return tuple(sorted(sites, key=lambda site: site.order))

    def read(self, flat: str) -> tuple[Place, ...]:
        """See `Architecture`; LDM's names are read for two residual blocks per level."""
        return _read(flat, _SD_LAYERS)

    def reader(self, sites: Sequence[Site]) -> Callable[[str], tuple[Place, ...]]:
        """See `Architecture`; LDM's names depend on the network's levels."""
        return partial(_read, layers=layers_of(sites) or _SD_LAYERS)

    def why_not(self, flat: str) -> str | None:
        """See `Architecture`."""
        if _FLAT_NORM.search(flat):
            return "normalisation layers multiply no matrix, so there is nothing to gate"
        return None

    def write(self, matrix: str, dialect: str) -> str:
        """See `Architecture`."""
        return matrix if any(place.matrix == matrix for place in self.read(matrix.replace(".", "_"))) else ""

    def prefix(self, slot: str, dialect: str, *, several: bool) -> str:
        """See `Architecture`."""
        return "lora_unet_" if dialect == "kohya" else f"{slot}."

    def family(self, slot: str, inputs: Mapping[str, int]) -> Base | None:
        """See `Architecture`: told by the input width of the cross-attention's keys or values."""
        width = next((width for name, width in inputs.items() if name.endswith(_TEXT_LEAVES)), None)
        return None if width is None else Base(_FAMILY_OF_WIDTH.get(width), width)

    def tokens(self, network: nn.Module, site: Site, stream: str, given: tuple[int, int] | int | None) -> int:
        """See `Architecture`; `given` is the latent's (height, width), by default the network's own."""
        if stream == CONTEXT:
            return TOKENS_OF_A_TEXT
        size = given if given is not None else getattr(getattr(network, "config", None), "sample_size", None)
        if isinstance(size, int):
            size = (size, size)
        if not isinstance(size, (tuple, list)):
            raise ConfigError(
                "pooling='flatten' needs the latent's size: pass flatten_tokens=(height, width)."
            )
        height, width = size
        for _ in range(site.depth if isinstance(site, UNetSite) else 0):
            height, width = (height + 1) // 2, (width + 1) // 2
        return int(height * width)

    def forward(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], given_size: tuple[int, int] | None
    ) -> Forward:
        """See `Architecture`: (latent (B, C, H, W), timestep, text), by place or by any host's names."""
        latent = args[0] if args else kwargs.get("sample", kwargs.get("x"))
        size = given_size
        if size is None and isinstance(latent, Tensor) and latent.dim() == 4:
            size = (latent.shape[-2], latent.shape[-1])
        mask = kwargs.get("encoder_attention_mask")
        return Forward(
            time=args[1] if len(args) > 1 else kwargs.get("timestep", kwargs.get("timesteps")),
            noise=_STEPS,
            size=size,
            grid=None if size is None else partial(halved_grid, size),
            masks={CONTEXT: mask} if isinstance(mask, Tensor) and mask.dim() == 2 else {},
        )


def _read(flat: str, layers: Sequence[int]) -> tuple[Place, ...]:
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


def halved_grid(size: tuple[int, int], tokens: int) -> tuple[int, int] | None:
    """(height, width) of image tokens at whichever level has so many of them; None if none has."""
    height, width = size
    for _ in range(_MAX_DEPTH):
        if height * width == tokens:
            return height, width
        height, width = (height + 1) // 2, (width + 1) // 2
    return None


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
        if rest in _OUTER:
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
    if inner not in _FUSED:
        return (Place(f"{holder}{leaf}", None, provisional, dialect),)
    parts = _FUSED[inner]
    return tuple(
        Place(
            f"{holder}{stem}transformer_blocks.{index}.{part}", (k, k + 1, len(parts)), provisional, dialect
        )
        for k, part in enumerate(parts)
    )


def _weighted(module: nn.Module) -> bool:
    """An identity in place of a skip connection has no weight."""
    return any(hasattr(module, name) for name in ("weight", "base_layer"))


def _running(
    network: nn.Module, attentions: list[re.Match[str]]
) -> Iterator[tuple[re.Match[str], str, slice | None]]:
    """(match, leaf, rows of the module) of the matrices that run: either the fused ones or their parts.

    diffusers keeps both; the attention's processor decides.
    """
    covered: set[str] = set()
    for match in attentions:
        if match["inner"] in _FUSED and _runs_fused(network, match.string):
            stem = match.string.removesuffix(match["inner"])
            covered.update(f"{stem}{part}" for part in _FUSED[match["inner"]])
    for match in attentions:
        leaf = match["outer"] or match["inner"]
        if leaf not in _FUSED:
            if match.string not in covered:
                yield match, leaf, None
        elif _runs_fused(network, match.string):
            parts = _FUSED[leaf]
            size = matrix_shape(base_layer(network.get_submodule(match.string)))[0] // len(parts)
            for k, part in enumerate(parts):
                yield match, part, slice(k * size, (k + 1) * size)


def _runs_fused(network: nn.Module, path: str) -> bool:
    attention = network.get_submodule(path.rpartition(".")[0])
    return type(getattr(attention, "processor", None)).__name__.startswith("Fused")


def _place_order(block: str, levels: int) -> tuple[int, int, int]:
    """(section, level, depth) of a diffusers block."""
    section, _, level = block.partition("_blocks.")
    if not level:
        return _SECTIONS["mid"], 0, levels
    number = int(level)
    return _SECTIONS[section], number, number if section == "down" else levels - number


def _attention_site(
    match: re.Match[str],
    leaf: str,
    rows: slice | None,
    place: tuple[str, int],
    last_block: int,
    levels: int,
) -> UNetSite:
    section, level, depth = _place_order(place[0], levels)
    name = f"{place[0]}.attentions.{place[1]}"
    outer = match["outer"] is not None
    index = (0 if leaf == "proj_in" else last_block) if outer else int(match["index"])
    block = f"{name}.transformer_blocks.{index}"
    layer, source = _LEAVES[leaf]
    inside = f"{match['prefix']}{match['holder']}.transformer_blocks.{index}"
    return UNetSite(
        name=f"{name}.{leaf}" if outer else f"{block}.{leaf}",
        path=match.string,
        block=block,
        layer=f"{name}.{layer}" if outer else f"{block}.{layer}",
        block_path=None if outer else inside,
        layer_path=None if outer else f"{inside}.{layer}",
        stream=CONTEXT if source == CONTEXT else TOKENS,
        source=f"{block}.{source}",
        order=(section, level, place[1], 1, index, list(_LEAVES).index(leaf)),
        kind=ATTENTION,
        rows=rows,
        depth=depth,
    )


def _residual_site(path: str, places: Mapping[str, tuple[str, int]], levels: int) -> UNetSite | None:
    """The site of a matrix of a residual block or a sampler, which is a block of its own; None for others."""
    residual, sampler = _RESIDUAL.match(path), _SAMPLER.match(path)
    match = residual or sampler
    if match is None:
        return None
    block, position = places[match["holder"]]
    section, level, depth = _place_order(block, levels)
    if residual is not None:
        leaf = {ldm: name for name, ldm in _RESNET_LEAVES.items()}.get(match["leaf"], match["leaf"])
        holder, order = f"{block}.resnets.{position}", (position, 0, 0, list(_RESNET_LEAVES).index(leaf))
    else:
        leaf, down = "conv", section == _SECTIONS["down"]
        holder, order = f"{block}.{'down' if down else 'up'}samplers.0", (_LAST, 0, 0, 0)
        depth += 1 if down else -1
    stream = EMBEDDING if leaf == "time_emb_proj" else TOKENS
    return _plain_site(f"{holder}.{leaf}", path, holder, stream, depth, (section, level, *order))


def _root_site(path: str) -> UNetSite | None:
    """The site of a matrix outside all levels; None for others."""
    match = _ROOT_PATH.match(path)
    if match is None:
        return None
    name = {ldm: name for name, ldm in _ROOT.items()}.get(match["name"], match["name"])
    section = _AFTER if name == "conv_out" else _BEFORE
    order = (section, list(_ROOT).index(name))
    embedding = name.partition(".")[0]
    return _plain_site(name, path, embedding, TOKENS if name == embedding else EMBEDDING, 0, order)


def _plain_site(
    name: str, path: str, block: str, stream: str, depth: int, order: tuple[int, ...]
) -> UNetSite:
    return UNetSite(
        name=name,
        path=path,
        block=block,
        layer=block,
        block_path=None,
        layer_path=None,
        stream=stream,
        source=name,
        order=order,
        kind=RESIDUAL,
        widens=name == _CONV_IN,
        depth=depth,
    )


def _diffusers_places(paths: list[str]) -> dict[str, tuple[str, int]]:
    """Name of every child of a block -> (block, position)."""
    places = {}
    for path in paths:
        local = re.sub(r"^(?:.*\.)?(?=(?:down_blocks|up_blocks|mid_block)\.)", "", path)
        if match := _PLACE.match(local):
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
