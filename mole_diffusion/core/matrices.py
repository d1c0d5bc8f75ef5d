"""Matrices of a network and the experts' factors for them, concatenated and cast once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import functional
from .context import Activation
from .experts import LoraFactors
from .modules import kernel_size, site_shape
from .networks.base import NetworkMap

# Tensors (per device, data type and active experts) that a matrix keeps ready before it drops them all; more
# than one forward needs, also with many experts that run one by one.
_KEPT = 64

T = TypeVar("T")


class TensorCache:
    """Keeps derived tensors, so that factors are concatenated and cast once and not per call."""

    def __init__(self) -> None:
        self._values: dict[Any, Any] = {}

    def get(self, key: Any, build: Callable[[], T]) -> T:
        """The value of `key`, built at first request, outside inference mode so that training may use it."""
        if key not in self._values:
            if len(self._values) >= _KEPT:
                self._values.clear()
            with torch.inference_mode(False), torch.no_grad():
                self._values[key] = build()
        value: T = self._values[key]
        return value

    def clear(self) -> None:
        """Drop everything."""
        self._values.clear()


@dataclass(eq=False)
class MatrixSlot:
    """One matrix of the network and the factors that the experts have for it.

    Attributes:
        name: canonical name.
        module: the Linear or Convolution that is hooked (inside any PEFT wrapper).
        stream: "tokens", "context", "joint" or "embedding".
        factors: expert index -> factors.
        rows: rows of the module's output that are this matrix; None for all.
        source: matrices of equal source read the same tensor.
        may_lead: whether its gate is read off it where another matrix of the same source could do.
        leads: whether it computes a gate of its group from its own rank activations.
    """

    name: str
    module: nn.Module
    stream: str
    factors: Mapping[int, LoraFactors]
    rows: slice | None = None
    source: str = ""
    may_lead: bool = True
    leads: bool = False
    cache: TensorCache = field(default_factory=TensorCache)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in); a kernel does not count."""
        return site_shape(self.module, self.rows)

    def mixed(self, active: tuple[int, ...]) -> tuple[int, ...]:
        """Active experts that have this matrix."""
        return tuple(i for i in active if i in self.factors)

    def projected(self, activation: Activation) -> tuple[int, ...]:
        """Experts whose down factors are multiplied: all if the gate reads them, else the active ones."""
        if self.leads and activation.fixed is None and len(activation.active) > 1:
            return tuple(self.factors)
        return self.mixed(activation.active)

    def rank(self, experts: tuple[int, ...]) -> int:
        """Sum of the ranks of `experts`."""
        return sum(self.factors[i].width for i in experts)

    def layout(self, experts: tuple[int, ...]) -> tuple[int, ...]:
        """Owner of each rank."""
        return tuple(i for i in experts for _ in range(self.factors[i].width))

    def owners(self, experts: tuple[int, ...], total: int, like: Tensor) -> Tensor:
        """(N, R) one-hot owner of each rank: a product with it is exact and faster than a gather."""

        def build() -> Tensor:
            owner = torch.tensor(self.layout(experts), device=like.device)
            return nn.functional.one_hot(owner, total).T.to(like.dtype).contiguous()

        return self.cache.get(("owners", experts, like.device, like.dtype), build)

    def up(self, experts: tuple[int, ...], like: Tensor) -> Tensor:
        """(R, d_out) concatenated up factors with scaling, on the device and in the data type of `like`."""

        def build() -> Tensor:
            scaled = [self.factors[i].weighted_up() for i in experts]
            return torch.cat(scaled, dim=1).T.to(like.device, like.dtype).contiguous()

        return self.cache.get(("up", experts, like.device, like.dtype), build)

    def columns(self, experts: tuple[int, ...], chosen: tuple[int, ...], device: torch.device) -> Tensor:
        """Positions of the ranks of `chosen` among those of `experts`."""

        def build() -> Tensor:
            owners = self.layout(experts)
            return torch.tensor([k for k, owner in enumerate(owners) if owner in chosen], device=device)

        return self.cache.get(("columns", experts, chosen, device), build)

    def gate_factors(self, device: torch.device) -> tuple[list[tuple[int, Tensor]], Tensor]:
        """Per expert s_i B_i, and their block-diagonal Gram matrix; float32."""

        def build() -> tuple[list[tuple[int, Tensor]], Tensor]:
            ups = [(i, f.weighted_up().to(device)) for i, f in self.factors.items()]
            gram: Tensor = torch.block_diag(*(up.T @ up for _, up in ups))  # type: ignore[no-untyped-call]
            return ups, gram

        return self.cache.get(("gate", device), build)


class Bundle:
    """Matrices that read the very same tensor (to_q, to_k, to_v): one product serves them all.

    Args:
        slots: the matrices in execution order.
    """

    def __init__(self, slots: list[MatrixSlot]) -> None:
        self.slots = slots
        self._cache = TensorCache()
        self._input: Tensor | None = None
        self._parts: dict[str, Tensor] = {}

    def project(self, slot: MatrixSlot, x: Tensor, like: Tensor, activation: Activation) -> Tensor:
        """Rank activations (B, L, R) of `slot` for its input x (B, L, d), in the data type of `like`.

        They are handed out once; `peek` leaves them there.
        """
        part = self.peek(slot, x, like, activation)
        del self._parts[slot.name]
        if not self._parts:
            self._input = None
        return part

    def peek(self, slot: MatrixSlot, x: Tensor, like: Tensor, activation: Activation) -> Tensor:
        """As `project`, for a matrix that runs later on the same input."""
        if self._input is not x or slot.name not in self._parts:
            wanted = {s.name: experts for s in self.slots if (experts := s.projected(activation))}
            factors = self._factors(wanted, like)
            z = rank_activations(slot.module, x, factors.down, factors.offset)
            if factors.shared is None:
                self._parts = dict(zip(wanted, torch.split(z, factors.sizes, dim=-1), strict=True))
            else:
                self._parts = {
                    name: z if columns is None else z.index_select(-1, columns)
                    for name, columns in zip(wanted, factors.shared, strict=True)
                }
            self._input = x
        return self._parts[slot.name]

    def alone(self, slot: MatrixSlot, expert: int, x: Tensor, like: Tensor) -> Tensor:
        """Rank activations of one expert for one matrix; its input is another one for every expert."""
        factors = slot.cache.get(
            ("down", expert, like.device, like.dtype), lambda: _share_down([[slot.factors[expert]]], like)
        )
        return rank_activations(slot.module, x, factors.down, factors.offset)

    def clear(self) -> None:
        """Let go of tensors that an interrupted forward left behind."""
        self._input = None
        self._parts = {}

    def release(self) -> None:
        """Let go of everything on a device."""
        self.clear()
        self._cache.clear()

    def _factors(self, wanted: dict[str, tuple[int, ...]], like: Tensor) -> _SharedDown:
        return self._cache.get(
            (tuple(wanted.items()), like.device, like.dtype),
            lambda: _share_down(
                [[s.factors[i] for i in wanted[s.name]] for s in self.slots if s.name in wanted], like
            ),
        )


@dataclass(frozen=True)
class _SharedDown:
    """The down factors of several matrices, each only once.

    Attributes:
        down: (R, in) for all matrices.
        offset: (R,) what is added to the products, or None.
        sizes: ranks of each matrix, if no two have a factor in common.
        shared: else the columns of each matrix among the products, None for all of them in order.
    """

    down: Tensor
    offset: Tensor | None
    sizes: list[int]
    shared: list[Tensor | None] | None


def _share_down(matrices: Sequence[Sequence[LoraFactors]], like: Tensor) -> _SharedDown:
    """The down factors of matrices; what the parts of a fused matrix have in common stands there once."""
    starts: dict[tuple[int, bool], int] = {}
    rows: list[Tensor] = []
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
                rows.append(one.rows())
                offsets.append(one.offset())
                total += one.width
            own += range(starts[key], starts[key] + one.width)
        columns.append(own)
    offset = torch.cat(offsets)
    sizes = [len(own) for own in columns]
    shared = None
    if sum(sizes) > total:
        everything = list(range(total))
        shared = [None if own == everything else torch.tensor(own, device=like.device) for own in columns]
    return _SharedDown(
        torch.cat(rows).to(like.device, like.dtype).contiguous(),
        offset.to(like.device, like.dtype) if offset.any() else None,
        sizes,
        shared,
    )


def rank_activations(module: nn.Module, x: Tensor, down: Tensor, offset: Tensor | None) -> Tensor:
    """(B, L, R) products of a matrix's input with down factors (R, in), in the factors' data type.

    Those of a convolution are computed by a convolution of the same kernel, stride and padding, so that L are
    the positions of its output.
    """
    kernel = kernel_size(module)
    if kernel is None:
        return nn.functional.linear(functional.tokens_of(x).to(down.dtype), down, offset)
    weight = down.view(down.shape[0], -1, *kernel)
    # PyTorch's own method also knows the module's padding mode (tiling pictures use "circular").
    z = nn.Conv2d._conv_forward(module, x.to(down.dtype), weight, offset)  # type: ignore[arg-type]
    return functional.tokens_of(z)


def output_tokens(module: nn.Module, x: Tensor) -> Tensor:
    """(B, L, in) view of a matrix's input at the positions of its output (a stride skips some)."""
    conv: Any = module
    if kernel_size(module) is not None and x.dim() == 4:
        size = [
            (x.shape[axis - 2] + 2 * conv.padding[axis] - conv.kernel_size[axis]) // conv.stride[axis] + 1
            for axis in (0, 1)
        ]
        x = x[..., :: conv.stride[0], :: conv.stride[1]][..., : size[0], : size[1]]
    return functional.tokens_of(x)


def build_bundles(slots: Mapping[str, MatrixSlot], layout: NetworkMap) -> list[Bundle]:
    """The matrices in bundles of those that read the very same tensor."""
    sources: dict[str, list[MatrixSlot]] = {}
    for site in layout.sites:
        if site.name in slots:
            sources.setdefault(site.source, []).append(slots[site.name])
    return [Bundle(members) for members in sources.values()]
