"""The matrices of a UNet: which modules they are under the names of diffusers or LDM, and when they run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from ...modules import base_layer, matrix_shape, runs_fused
from ..base import ATTENTION, CONTEXT, EMBEDDING, RESIDUAL, TOKENS, Site
from .names import CONV_IN, FUSED, LEAVES, OUTER, RESNET_LEAVES, ROOT, alternatives

_INNER = alternatives(leaf for leaf in (*LEAVES, *FUSED) if leaf not in OUTER)
_PREFIX = r"^(?P<prefix>(?:.*\.)?)"
_ATTENTION = re.compile(
    rf"{_PREFIX}(?P<holder>(?:down_blocks|up_blocks)\.\d+\.attentions\.\d+|mid_block\.attentions\.\d+"
    r"|(?:input_blocks|output_blocks)\.\d+\.\d+|middle_block\.\d+)\."
    rf"(?:(?P<outer>proj_in|proj_out)|transformer_blocks\.(?P<index>\d+)\.(?P<inner>{_INNER}))$"
)
_RESIDUAL = re.compile(
    rf"{_PREFIX}(?P<holder>(?:down_blocks|up_blocks)\.\d+\.resnets\.\d+|mid_block\.resnets\.\d+"
    r"|(?:input_blocks|output_blocks)\.\d+\.0|middle_block\.[02])\."
    rf"(?P<leaf>{alternatives((*RESNET_LEAVES, *RESNET_LEAVES.values()))})$"
)
_SAMPLER = re.compile(
    rf"{_PREFIX}(?P<holder>down_blocks\.\d+\.downsamplers\.0|up_blocks\.\d+\.upsamplers\.0"
    r"|input_blocks\.\d+\.0|output_blocks\.\d+\.[12])\.(?P<leaf>conv|op)$"
)
_ROOT_PATH = re.compile(rf"{_PREFIX}(?P<name>{alternatives((*ROOT, *ROOT.values()))})$")
_PLACE = re.compile(r"^((?:down|up)_blocks\.\d+|mid_block)\.\w+\.(\d+)$")
_LDM_CHILD = re.compile(r"^(?:.*\.)?(input|output)_blocks\.(\d+)\.\d+$")
_SECTIONS = {"down": 0, "mid": 1, "up": 2}
# Sections of what runs before and after the levels.
_BEFORE, _AFTER = -1, 3
# Samplers run after all residual blocks of their level.
_LAST = 1_000


@dataclass(frozen=True, eq=False)
class UNetSite(Site):
    """One matrix of a UNet.

    Attributes:
        depth: number of halvings between the latent and the tokens that the matrix writes.
    """

    depth: int = 0


def unet_sites(network: nn.Module) -> tuple[Site, ...]:
    """All matrices in execution order; where projections are fused, rows of the fused modules."""
    modules = dict(network.named_modules())
    paths = list(modules)
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
    for path, module in modules.items():
        if _weighted(module):
            site = _residual_site(path, places, levels) or _root_site(path)
            if site is not None:
                sites.append(site)
    return tuple(sorted(sites, key=lambda site: site.order))


def _weighted(module: nn.Module) -> bool:
    """An identity in place of a skip connection has no weight."""
    return any(hasattr(module, name) for name in ("weight", "base_layer"))


def _running(
    network: nn.Module, attentions: list[re.Match[str]]
) -> Iterator[tuple[re.Match[str], str, slice | None]]:
    """(match, leaf, rows of the module) of the matrices that run: either the fused ones or their parts."""
    covered: set[str] = set()
    for match in attentions:
        if match["inner"] in FUSED and runs_fused(_holder(network, match.string)):
            stem = match.string.removesuffix(match["inner"])
            covered.update(f"{stem}{part}" for part in FUSED[match["inner"]])
    for match in attentions:
        leaf = match["outer"] or match["inner"]
        if leaf not in FUSED:
            if match.string not in covered:
                yield match, leaf, None
        elif runs_fused(_holder(network, match.string)):
            parts = FUSED[leaf]
            size = matrix_shape(base_layer(network.get_submodule(match.string)))[0] // len(parts)
            for k, part in enumerate(parts):
                yield match, part, slice(k * size, (k + 1) * size)


def _holder(network: nn.Module, path: str) -> nn.Module:
    return network.get_submodule(path.rpartition(".")[0])


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
    layer, source = LEAVES[leaf]
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
        order=(section, level, place[1], 1, index, list(LEAVES).index(leaf)),
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
        leaf = {ldm: name for name, ldm in RESNET_LEAVES.items()}.get(match["leaf"], match["leaf"])
        holder, order = f"{block}.resnets.{position}", (position, 0, 0, list(RESNET_LEAVES).index(leaf))
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
    name = {ldm: name for name, ldm in ROOT.items()}.get(match["name"], match["name"])
    section = _AFTER if name == "conv_out" else _BEFORE
    order = (section, list(ROOT).index(name))
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
        widens=name == CONV_IN,
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
