"""`Stack`: an architecture from a table, for networks whose blocks stand in rows of equal ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from ..modules import base_layer, matrix_shape, runs_fused
from .base import ATTENTION, EMBEDDING, RESIDUAL, ROW, TOKENS, Base, Forward, Looking, Place, Role, Site
from .looking import Looks, looking

#: Inputs of a network's forward (args, kwargs, a size that a host gives) -> what they say.
Inputs = Callable[[tuple[Any, ...], Mapping[str, Any], "tuple[int, int] | None"], Forward]
#: (network, stream, `flatten_tokens`) -> tokens that a flattened gate reads.
Counter = Callable[[nn.Module, str, "tuple[int, int] | int | None"], int]
#: Another name of a matrix: its canonical one, or those of the matrices that it fuses with their shares.
Names = Mapping[str, "str | Mapping[str, int]"]


#: Whose names of matrices a file has that are not the canonical ones.
MAKERS = "the makers' names"
# Section of what runs before all blocks, and number of a block behind all of its row.
_BEFORE, _BEHIND = -1, 1_000_000


@dataclass(frozen=True)
class Leaf:
    """One matrix of a block, or one outside all blocks.

    Attributes:
        name: dotted, inside the block.
        stream: what it reads: "tokens", "context", "joint" or "embedding". A row that may run before any
            tokens has a gate to itself.
        source: leaves of equal source read the same tensor; by default its name.
        layer: the attention or feed-forward it belongs to; by default its name up to the first dot.
        leads, identifies, folds, amid: see `Site`.
        after: of a leaf that runs before some blocks: the row of blocks behind which it does.
    """

    name: str
    stream: str = TOKENS
    source: str = ""
    layer: str = ""
    leads: bool = True
    identifies: bool = True
    folds: bool = False
    amid: bool = False
    after: str = ""


@dataclass(frozen=True)
class Blocks:
    """A row of equal blocks.

    Attributes:
        path: canonical; block 3 is `PATH.3`.
        leaves: in execution order.
        also: what networks and files of other hosts call the row.
        written: what files alone call it.
        names: other names of leaves inside a block. A fused matrix has the leaves in the order of their rows,
            each with its share of them.
        returns: streams of the tensors that a block returns, where they are several.
        returned_by: class of a block -> the same, where it is otherwise.
        looks: how image tokens look at text there; None where they do not.
    """

    path: str
    leaves: tuple[Leaf, ...]
    also: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    names: Names = field(default_factory=dict)
    returns: tuple[str, ...] = ()
    returned_by: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    looks: Looks | None = None

    @cached_property
    def parts(self) -> dict[str, tuple[tuple[str, tuple[int, int, int] | None], ...]]:
        """Name inside a block -> (canonical leaf, its share of the rows) of each matrix that is meant."""
        parts = {leaf.name: ((leaf.name, None),) for leaf in self.leaves}
        return parts | {name: tuple(_shares(meant)) for name, meant in self.names.items()}

    @cached_property
    def flat(self) -> dict[str, str]:
        """The names of `parts` as files have them, with "_" for "." -> the name."""
        return {name.replace(".", "_"): name for name in self.parts}


def _shares(meant: str | Mapping[str, int]) -> Iterator[tuple[str, tuple[int, int, int] | None]]:
    if isinstance(meant, str):
        yield meant, None
        return
    start, total = 0, sum(meant.values())
    for leaf, share in meant.items():
        yield leaf, (start, start + share, total)
        start += share


@dataclass(frozen=True, eq=False)
class Stack:
    """An `Architecture` whose blocks stand in rows.

    Attributes:
        name, role, slots, prefixes, writers, families, example, text_gates, causal: see `Architecture`.
        inputs: what the inputs of a forward say.
        counter: tokens for flattened gates.
        before, after: matrices that run before and after all blocks.
        blocks: rows of blocks in execution order.
        names: other names of matrices outside all blocks, in networks and files.
        swapped: those of them whose rows have their halves in the other order.
        ratios: name inside a block -> (outputs, inputs) of its matrix, cut down, where another kind of
            network has matrices of the same name and other proportions.
        marker: pattern of a module's path that every such network has; "" for none.
        stranger: the same of one that none has, for kinds of networks with blocks of the same names.
        wrapper: name of a module that may stand around the blocks and belongs to no canonical name.
        beside: name of a module inside the network with blocks that are called alike and are not its own.
        refused: (pattern of flat names, reason) of what such networks have and cannot be gated.
        kohya: slot -> what kohya puts before names in a base with one text encoder, and in one with more.
        kohya_native: whether kohya writes the makers' names of matrices, none of which is fused.
        tell: slot, inputs of the matrices -> base model.
    """

    name: str
    role: Role
    slots: tuple[str, ...]
    prefixes: Mapping[str, tuple[str, ...]]
    blocks: tuple[Blocks, ...]
    inputs: Inputs
    counter: Counter
    families: tuple[str, ...] = ()
    before: tuple[Leaf, ...] = ()
    after: tuple[Leaf, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    swapped: tuple[str, ...] = ()
    ratios: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    marker: str = ""
    stranger: str = ""
    wrapper: str = ""
    beside: str = ""
    refused: tuple[tuple[str, str], ...] = ()
    kohya: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    writers: Mapping[str, str] = field(default_factory=dict)
    kohya_native: bool = False
    tell: Callable[[str, Mapping[str, int]], Base | None] = lambda slot, inputs: None
    text_gates: bool = False
    causal: bool = False

    @property
    def example(self) -> str:
        """See `Architecture`."""
        row = self.blocks[0]
        return f"{row.path}.0.{row.leaves[0].name}"

    def sites(self, network: nn.Module) -> tuple[Site, ...]:
        """See `Architecture`."""
        found: list[Site] = []
        around = ""
        modules = dict(network.named_modules())
        if self.beside:
            modules = {path: one for path, one in modules.items() if self.beside not in path.split(".")}
        if not self._is_one(modules):
            return ()
        for path, module in modules.items():
            for number, row in enumerate(self.blocks):
                match = self._paths[number].match(path)
                if match is None:
                    continue
                block = modules[f"{match['holder']}.{match['index']}"]
                own = tuple(_block_sites(number, row, match, module, type(block).__name__))
                if len(own) == 1 or runs_fused(modules[path.rpartition(".")[0]]):
                    found += own
                    around = match["around"]
        if not found:
            return ()
        fused = {site.name for site in found if site.rows is not None}
        sites = [site for site in found if site.rows is not None or site.name not in fused]
        sites += self._root_sites(
            modules, around.removesuffix(f"{self.wrapper}.") if self.wrapper else around
        )
        return tuple(sorted(sites, key=lambda site: site.order))

    def _root_sites(self, modules: Mapping[str, nn.Module], around: str) -> Iterator[Site]:
        """The matrices outside all blocks, inside a module of some path."""
        for section, leaves in ((_BEFORE, self.before), (len(self.blocks), self.after)):
            for index, leaf in enumerate(leaves):
                paths = [f"{around}{name}" for name, meant in self._root_names.items() if meant == leaf.name]
                path = next((path for path in paths if path in modules), None)
                if path is not None:
                    swapped = path.removeprefix(around) in self.swapped
                    order = (self._row_number(leaf.after), _BEHIND, index) if leaf.after else (section, index)
                    yield _root_site(leaf, path, order, swapped)

    def _row_number(self, path: str) -> int:
        return [row.path for row in self.blocks].index(path)

    def _is_one(self, modules: Mapping[str, nn.Module]) -> bool:
        """Whether these are the modules of a network of this kind, as far as their paths tell."""
        marked = not self.marker or any(re.search(self.marker, path) for path in modules)
        return marked and not (self.stranger and any(re.search(self.stranger, path) for path in modules))

    @cached_property
    def _root_names(self) -> dict[str, str]:
        """Names of matrices outside all blocks -> canonical ones."""
        return {leaf.name: leaf.name for leaf in (*self.before, *self.after)} | dict(self.names)

    @cached_property
    def _flat_roots(self) -> dict[str, str]:
        """The same in files."""
        return {name.replace(".", "_"): meant for name, meant in self._root_names.items()}

    @cached_property
    def _paths(self) -> tuple[re.Pattern[str], ...]:
        """What modules of each row of blocks are called."""
        around = rf"(?:(?:.*\.)?{re.escape(self.wrapper)}\.)?" if self.wrapper else r"(?:.*\.)?"
        return tuple(
            re.compile(
                rf"^(?P<holder>(?P<around>{around})(?:{_either((row.path, *row.also))}))\."
                rf"(?P<index>\d+)\.(?P<leaf>{_either(row.parts)})$"
            )
            for row in self.blocks
        )

    @cached_property
    def _flat_rows(self) -> tuple[re.Pattern[str], ...]:
        """The same in files."""
        around = f"(?:{self.wrapper}_)?" if self.wrapper else ""
        rows = [[name.replace(".", "_") for name in (r.path, *r.also, *r.written)] for r in self.blocks]
        return tuple(re.compile(rf"^{around}(?:{_either(row)})_(?P<index>\d+)_(?P<leaf>.+)$") for row in rows)

    def reader(self, sites: Sequence[Site]) -> Callable[[str], tuple[Place, ...]]:
        """See `Architecture`: the same in all networks."""
        return self.read

    def read(self, flat: str) -> tuple[Place, ...]:
        """See `Architecture`."""
        bare = flat.removeprefix(f"{self.wrapper}_") if self.wrapper else flat
        if bare in self._flat_roots:
            swapped = any(name.replace(".", "_") == bare for name in self.swapped)
            meant = self._flat_roots[bare]
            return (Place(meant, swapped=swapped, dialect=_whose(bare, meant)),)
        for row, pattern in zip(self.blocks, self._flat_rows, strict=True):
            match = pattern.match(flat)
            if match and match["leaf"] in row.flat:
                block = f"{row.path}.{match['index']}"
                parts = row.parts[row.flat[match["leaf"]]]
                whose = _whose(bare, *(f"{block}.{leaf}" for leaf, _ in parts))
                return tuple(Place(f"{block}.{leaf}", share, dialect=whose) for leaf, share in parts)
        return ()

    def fits(self, flat: str, outputs: int, inputs: int) -> bool:
        """See `Architecture`."""
        for row, pattern in zip(self.blocks, self._flat_rows, strict=True):
            match = pattern.match(flat)
            ratio = self.ratios.get(row.flat.get(match["leaf"], "")) if match else None
            if ratio is not None:
                return outputs * ratio[1] == inputs * ratio[0]
        return True

    def why_not(self, flat: str) -> str | None:
        """See `Architecture`."""
        return next((reason for pattern, reason in self.refused if re.search(pattern, flat)), None)

    def text_readers(self, sites: Sequence[Site]) -> tuple[tuple[Site, Site], ...]:
        """See `Architecture`."""
        return ()

    def looking(self, sites: Sequence[Site]) -> Looking | None:
        """See `Architecture`."""
        return looking(((row.path, row.looks) for row in self.blocks), sites)

    def leaf(self, matrix: str) -> str:
        """See `Architecture`."""
        for row in self.blocks:
            index, _, leaf = matrix.removeprefix(f"{row.path}.").partition(".")
            if matrix.startswith(f"{row.path}.") and index.isdigit():
                return leaf
        return matrix

    def write(self, matrix: str, dialect: str) -> str:
        """See `Architecture`."""
        if not any(place.matrix == matrix for place in self.read(matrix.replace(".", "_"))):
            return ""
        if dialect == "kohya" and self.kohya_native:
            return self._native(matrix)
        # What stands outside the blocks stands beside the wrapper.
        inside = matrix.startswith(tuple(f"{row.path}." for row in self.blocks))
        return f"{self.wrapper}.{matrix}" if self.wrapper and inside else matrix

    def _native(self, matrix: str) -> str:
        """What its makers call a matrix."""
        for row in self.blocks:
            index, _, leaf = matrix.removeprefix(f"{row.path}.").partition(".")
            if matrix.startswith(f"{row.path}.") and index.isdigit():
                native = next(name for name, meant in row.names.items() if meant == leaf)
                return f"{(*row.also, row.path)[0]}.{index}.{native}"
        return next(name for name, meant in self.names.items() if meant == matrix)

    def prefix(self, slot: str, dialect: str, *, several: bool) -> str:
        """See `Architecture`."""
        return self.kohya[slot][several] if dialect == "kohya" else f"{slot}."

    def family(self, slot: str, inputs: Mapping[str, int]) -> Base | None:
        """See `Architecture`."""
        return self.tell(slot, inputs)

    def tokens(self, network: nn.Module, site: Site, stream: str, given: tuple[int, int] | int | None) -> int:
        """See `Architecture`."""
        return self.counter(network, stream, given)

    def forward(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], given_size: tuple[int, int] | None
    ) -> Forward:
        """See `Architecture`."""
        return self.inputs(args, kwargs, given_size)


def _whose(flat: str, *meant: str) -> str | None:
    """Whose name of a matrix, or of several that are fused, a file has, if it is not the canonical one."""
    return None if [name.replace(".", "_") for name in meant] == [flat] else MAKERS


def _either(names: Sequence[str] | Mapping[str, object]) -> str:
    return "|".join(re.escape(name) for name in names)


def _block_sites(
    number: int, row: Blocks, match: re.Match[str], module: nn.Module, kind: str
) -> Iterator[Site]:
    """The sites of one module of a block of some class: several if it fuses matrices."""
    index = int(match["index"])
    block, block_path = f"{row.path}.{index}", f"{match['holder']}.{index}"
    leaves = {leaf.name: (position, leaf) for position, leaf in enumerate(row.leaves)}
    for name, share in row.parts[match["leaf"]]:
        position, leaf = leaves[name]
        layer = leaf.layer or name.partition(".")[0]
        # A layer of its own that is one matrix is no module around it.
        inside = match["leaf"].rpartition(".")[0].partition(".")[0]
        rows = Place(name, share).rows(matrix_shape(base_layer(module))[0])
        apart = leaf.stream == EMBEDDING
        yield Site(
            name=f"{block}.{name}",
            path=match.string,
            block=f"{block}.{name}" if apart else block,
            layer=f"{block}.{name}" if apart else f"{block}.{layer}",
            # What has more axes than pictures and tokens is no block that could run alone.
            block_path=None if apart or leaf.folds else block_path,
            layer_path=f"{block_path}.{inside}" if inside and not (apart or leaf.folds) else None,
            stream=leaf.stream,
            source=f"{block}.{leaf.source or name}",
            order=(number, index, position),
            kind=ROW if apart else ATTENTION,
            returns=row.returned_by.get(kind, row.returns),
            rows=rows,
            leads=leaf.leads,
            identifies=leaf.identifies,
            folds=leaf.folds,
            amid=leaf.amid,
        )


def _root_site(leaf: Leaf, path: str, order: tuple[int, ...], swapped: bool) -> Site:
    """The site of a matrix outside all blocks, which is a block of its own."""
    return Site(
        name=leaf.name,
        path=path,
        block=leaf.name,
        layer=leaf.name,
        block_path=None,
        layer_path=None,
        stream=leaf.stream,
        source=leaf.source or leaf.name,
        order=order,
        kind=ROW if leaf.stream == EMBEDDING and order[0] == _BEFORE else RESIDUAL,
        swapped=swapped,
        identifies=leaf.identifies,
        folds=leaf.folds,
        amid=leaf.amid,
    )
