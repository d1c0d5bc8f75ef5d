"""Rank space: products with down factors, which expert each rank belongs to, and what gates read there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import functional
from .caches import TensorCache
from .factors import LoraFactors
from .modules import kernel_size
from .torch_state import as_type

# Up to so many ranks a dense block-diagonal matrix costs less than its blocks alone: more products.
_DENSE = 256
# Layouts that are told apart at a time; choices of many experts make many.
_LAYOUTS = 1024


class Layouts:
    """Which expert each rank of a matrix belongs to; matrices that agree have one number and share tensors.

    Args:
        experts: N.
    """

    def __init__(self, experts: int) -> None:
        self._experts = experts
        self._numbers: dict[tuple[int, ...], int] = {}
        self._next = 0
        self._cache = TensorCache()

    def number(self, owners: tuple[int, ...]) -> int:
        """Of a layout, given as the owner of each rank."""
        if owners not in self._numbers:
            if len(self._numbers) >= _LAYOUTS:
                self._numbers.clear()  # a number is never used again
            self._numbers[owners] = self._next
            self._next += 1
        return self._numbers[owners]

    def one_hot(self, owners: tuple[int, ...], device: torch.device) -> Tensor:
        """(N, R) owner of each rank, float32: a product with it is exact and faster than a gather."""

        def build() -> Tensor:
            one_hot = nn.functional.one_hot(torch.tensor(owners, dtype=torch.long), self._experts)
            return one_hot.T.float().contiguous().to(device)

        return self._cache.get((owners, device), build)

    def release(self) -> None:
        """Let go of everything on a device."""
        self._cache.clear()


@dataclass(frozen=True, eq=False)
class SharedDown:
    """The down factors of several matrices, each only once.

    Attributes:
        down: (in, R) for all matrices, transposed; (R, in / groups, height, width) for a kernel.
        offset: (R,) what is added to the products, or None.
        sizes: ranks of each matrix, if no two have a factor in common.
        shared: else the columns of each matrix among the products, None for all of them in order.
    """

    down: Tensor
    offset: Tensor | None
    sizes: list[int]
    shared: list[Tensor | None] | None

    def parts(self, rows: Tensor) -> Sequence[Tensor]:
        """The ranks of each matrix among the products (M, R)."""
        if self.shared is not None:
            return [rows if own is None else rows.index_select(-1, own) for own in self.shared]
        return torch.split(rows, self.sizes, dim=-1) if len(self.sizes) > 1 else [rows]


def share_down(
    module: nn.Module,
    matrices: Sequence[Sequence[LoraFactors]],
    device: torch.device,
    dtype: torch.dtype,
) -> SharedDown:
    """The down factors of matrices; what the parts of a fused matrix have in common stands there once.

    Args:
        module: one of those that hold the matrices, all of which read the same tensor.
        matrices: factors of each.
        device, dtype: of the products.
    """
    starts: dict[tuple[int, bool], int] = {}
    down: list[Tensor] = []
    offsets: list[Tensor] = []
    columns: list[list[int]] = []
    total = 0
    for factors in matrices:
        own: list[int] = []
        for one in factors:
            # A bias is one more row, after the same ones.
            key = id(one.down), one.bias is not None
            if key not in starts:
                starts[key] = total
                down.append(one.rows())
                offsets.append(one.offset())
                total += one.width
            own += range(starts[key], starts[key] + one.width)
        columns.append(own)
    biased = any(one.bias is not None for factors in matrices for one in factors)
    sizes = [len(own) for own in columns]
    shared = None
    if sum(sizes) > total:
        everything = list(range(total))
        shared = [None if own == everything else torch.tensor(own, device=device) for own in columns]
    rows = torch.cat(down).to(device, dtype).contiguous()
    kernel = kernel_size(module)
    return SharedDown(
        rows.T if kernel is None else rows.view(rows.shape[0], -1, *kernel),
        torch.cat(offsets).to(device, dtype) if biased else None,
        sizes,
        shared,
    )


def down_bytes(matrices: Sequence[Sequence[LoraFactors]], item: int) -> int:
    """Bytes of `share_down`, but for a few numbers of where its parts stand.

    Args:
        matrices: factors of each matrix.
        item: bytes of one number.
    """
    unique = {(id(one.down), one.bias is not None): one for factors in matrices for one in factors}
    return item * sum(one.width * one.down[0].numel() for one in unique.values())


def rank_rows(module: nn.Module, x: Tensor, factors: SharedDown) -> Tensor:
    """(B * L, R) products of a matrix's input with down factors, in the factors' data type.

    Those of a convolution are computed by a convolution of the same kernel, stride and padding, so that L are
    the positions of its output.
    """
    x = as_type(x, factors.down.dtype)
    if factors.down.dim() == 4:
        # PyTorch's own method also knows the module's padding mode (tiling pictures use "circular").
        z = nn.Conv2d._conv_forward(module, x, factors.down, factors.offset)  # type: ignore[arg-type]
        return functional.rows_of(functional.tokens_of(z))
    tokens = functional.tokens_of(x)
    if not tokens.is_contiguous():
        # This one reads an image as tokens without a copy of it.
        return functional.rows_of(nn.functional.linear(tokens, factors.down.T, factors.offset))
    rows = functional.rows_of(tokens)
    return (
        rows.mm(factors.down) if factors.offset is None else torch.addmm(factors.offset, rows, factors.down)
    )


@dataclass(frozen=True, eq=False)
class GateFactors:
    """What a gate needs of the experts to read their outputs in rank space; float32.

    Experts of equal rank are together, so that one product serves them all.

    Attributes:
        experts: for each rank that occurs, the (n,) experts that have it; None for all experts in order.
        ups: for each rank that occurs, their s_i B_i^T (n, r, d).
        order: (R,) places of the ranks, in the order of the experts, among those of `ups`; None for the same.
        root: C of `functional.expert_logits`.
        owners: (R, N) one-hot owner of each rank.
    """

    experts: tuple[Tensor | None, ...]
    ups: tuple[Tensor, ...]
    order: Tensor | None
    root: functional.Root
    owners: Tensor

    def project(self, projection: Tensor, *, own: bool = False) -> Tensor:
        """P (..., R, N) of `functional.expert_logits`.

        Args:
            projection: of the gate, (..., N, d, N); or (..., N, d) where experts score their own outputs.
            own: whether they do.
        """
        if own:
            return self.project(projection.unsqueeze(-1)) * self.owners
        parts = []
        for experts, ups in zip(self.experts, self.ups, strict=True):
            theirs = projection if experts is None else projection.index_select(-3, experts)
            parts.append((ups @ theirs).flatten(-3, -2))
        projected = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)
        return projected if self.order is None else projected.index_select(-2, self.order)


def gate_factors(factors: Mapping[int, LoraFactors], experts: int, device: torch.device) -> GateFactors:
    """For a matrix of which some of N experts have factors, ascending."""
    alike: dict[int, list[int]] = {}
    starts, total = {}, 0
    for i, one in factors.items():
        alike.setdefault(one.width, []).append(i)
        starts[i], total = total, total + one.width
    places = [starts[i] + k for width, own in alike.items() for i in own for k in range(width)]
    stacked = tuple(
        torch.stack([factors[i].weighted_up() for i in own]).to(device).transpose(1, 2)
        for own in alike.values()
    )
    everybody = list(range(experts))
    owners = [i for i, one in factors.items() for _ in range(one.width)]
    chosen = None if places == sorted(places) else torch.tensor(places, device=device)
    return GateFactors(
        tuple(None if own == everybody else torch.tensor(own, device=device) for own in alike.values()),
        stacked,
        None if chosen is None else chosen.argsort(),
        _root(stacked, alike, chosen),
        nn.functional.one_hot(torch.tensor(owners), experts).float().to(device),
    )


def gate_bytes(factors: Mapping[int, LoraFactors], experts: int) -> int:
    """Bytes of `gate_factors` and of what the gate makes of them, but for a few numbers of where parts stand.

    Args:
        factors: of the experts that have the matrix.
        experts: N.
    """
    widths = [one.width for one in factors.values()]
    total, blocks = sum(widths), sum(width * width for width in widths)
    ups = sum(one.width * one.up.shape[0] for one in factors.values())
    # A dense root is kept beside the projection once more.
    root = 2 * total * total if total <= _DENSE or len(set(widths)) == len(widths) else blocks
    return 4 * (ups + root + 3 * total * experts)


def _root(
    stacked: Sequence[Tensor], alike: Mapping[int, Sequence[int]], places: Tensor | None
) -> functional.Root:
    """Dense where that is small, else block by block.

    Args:
        stacked: (n, r, d) for each rank that occurs.
        alike: the n experts of each rank.
        places: of these ranks in the order of the experts; None for the same.
    """
    # Not every device has QR decompositions; the CPU has.
    blocks = [
        torch.linalg.qr(ups.transpose(1, 2).cpu(), mode="r").R.transpose(1, 2).to(ups.device)
        for ups in stacked
    ]
    sizes = [len(own) * width for width, own in alike.items()]
    if sum(sizes) <= _DENSE or sizes == [*alike]:
        by_expert = {
            i: block
            for own, group in zip(alike.values(), blocks, strict=True)
            for i, block in zip(own, group, strict=True)
        }
        dense: Tensor = torch.block_diag(*(by_expert[i] for i in sorted(by_expert)))  # type: ignore[no-untyped-call]
        return dense
    columns: list[Tensor | None] = [None]
    if places is not None or len(sizes) > 1:
        every = torch.arange(sum(sizes), device=stacked[0].device) if places is None else places
        columns = list(torch.split(every, sizes))
    return tuple(
        functional.RootBlocks(chosen, block.contiguous())
        for chosen, block in zip(columns, blocks, strict=True)
    )
