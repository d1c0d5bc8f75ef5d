"""Matrices of a network and the experts' factors for them, concatenated and cast once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import functional
from .architectures import NetworkMap
from .context import Activation
from .errors import InjectionError
from .experts import Expert, LoraFactors

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


@dataclass(eq=False)
class MatrixSlot:
    """One matrix of the network and the factors that the experts have for it.

    Attributes:
        name: canonical name.
        module: the Linear or Convolution that is hooked (inside any PEFT wrapper).
        stream: "tokens" or "context".
        factors: expert index -> factors.
        leads: whether it computes its group's gate from its own rank activations.
    """

    name: str
    module: nn.Module
    stream: str
    factors: Mapping[int, LoraFactors]
    leads: bool = False
    cache: TensorCache = field(default_factory=TensorCache)

    def mixed(self, active: tuple[int, ...]) -> tuple[int, ...]:
        """Active experts that have this matrix."""
        return tuple(i for i in active if i in self.factors)

    def projected(self, activation: Activation) -> tuple[int, ...]:
        """Experts whose down factors are multiplied: all if the gate reads them, else the active ones."""
        if self.leads and activation.fixed is None and len(activation.active) > 1:
            return tuple(self.factors)
        return self.mixed(activation.active)

    def down_rows(self, experts: tuple[int, ...]) -> list[Tensor]:
        """Down factors (r_i, in)."""
        return [self.factors[i].matrices[0] for i in experts]

    def rank(self, experts: tuple[int, ...]) -> int:
        """Sum of the ranks of `experts`."""
        return sum(self.factors[i].rank for i in experts)

    def layout(self, experts: tuple[int, ...]) -> tuple[int, ...]:
        """Owner of each rank."""
        return tuple(i for i in experts for _ in range(self.factors[i].rank))

    def owners(self, experts: tuple[int, ...], total: int, like: Tensor) -> Tensor:
        """(N, R) one-hot owner of each rank: a product with it is exact and faster than a gather."""

        def build() -> Tensor:
            owner = torch.tensor(self.layout(experts), device=like.device)
            return nn.functional.one_hot(owner, total).T.to(like.dtype).contiguous()

        return self.cache.get(("owners", experts, like.device, like.dtype), build)

    def up(self, experts: tuple[int, ...], like: Tensor) -> Tensor:
        """(R, d_out) concatenated up factors with scaling, on the device and in the data type of `like`."""

        def build() -> Tensor:
            scaled = [self.factors[i].matrices[1].float() * self.factors[i].scaling for i in experts]
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
            ups = [(i, (f.matrices[1].float() * f.scaling).to(device)) for i, f in self.factors.items()]
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
        """Rank activations (B, L, R) of `slot` for its input x (B, L, d), in the data type of `like`."""
        if self._input is not x or slot.name not in self._parts:
            rows = {s.name: experts for s in self.slots if (experts := s.projected(activation))}
            down = self._down(rows, like)
            z = nn.functional.linear(functional.tokens_of(x).to(like.dtype), down)
            sizes = [s.rank(rows[s.name]) for s in self.slots if s.name in rows]
            self._parts = dict(zip(rows, torch.split(z, sizes, dim=-1), strict=True))
            self._input = x
        part = self._parts.pop(slot.name)
        if not self._parts:
            self._input = None
        return part

    def clear(self) -> None:
        """Let go of tensors that an interrupted forward left behind."""
        self._input = None
        self._parts = {}

    def _down(self, rows: dict[str, tuple[int, ...]], like: Tensor) -> Tensor:
        def build() -> Tensor:
            used = [s for s in self.slots if s.name in rows]
            tensors = [row.float() for s in used for row in s.down_rows(rows[s.name])]
            return torch.cat(tensors).to(like.device, like.dtype).contiguous()

        return self._cache.get((tuple(rows.items()), like.device, like.dtype), build)


def base_layer(module: nn.Module) -> nn.Module:
    """The layer inside any number of PEFT wrappers."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a Linear or 1x1 convolution, also quantised or offloaded."""
    for names in (("out_features", "in_features"), ("out_channels", "in_channels")):
        if all(hasattr(module, name) for name in names):
            return int(getattr(module, names[0])), int(getattr(module, names[1]))
    weight: Any = module.weight
    return int(weight.shape[0]), int(weight.shape[1])


def fingerprint(network: nn.Module, layout: NetworkMap) -> dict[str, str]:
    digest = hashlib.sha256()
    for site in sorted(layout.sites, key=lambda site: site.name):
        digest.update(f"{site.name} {matrix_shape(base_layer(network.get_submodule(site.path)))};".encode())
    return {"class": type(network).__name__, "shapes": digest.hexdigest()}


def build_slots(
    network: nn.Module, experts: Sequence[Expert], layout: NetworkMap
) -> tuple[dict[str, MatrixSlot], dict[str, tuple[str, ...]]]:
    """Matrices that an expert has, in execution order, and the experts' matrices without a place."""
    owned = [expert.factors.get(layout.part, {}) for expert in experts]
    known = {site.name for site in layout.sites}
    unmatched = {
        expert.name: tuple(name for name in own if name not in known)
        for expert, own in zip(experts, owned, strict=True)
    }
    for expert, own in zip(experts, owned, strict=True):
        if own and len(unmatched[expert.name]) == len(own):
            raise InjectionError(
                f"Expert {expert.name!r} matches nothing in this {type(network).__name__}: it has "
                f"{unmatched[expert.name][0]!r}, the network has {layout.sites[0].name!r}."
            )
    slots: dict[str, MatrixSlot] = {}
    for site in layout.sites:
        factors = {i: own[site.name] for i, own in enumerate(owned) if site.name in own}
        if factors:
            module = base_layer(network.get_submodule(site.path))
            for i, pair in factors.items():
                _check_shapes(site.name, experts[i].name, pair, matrix_shape(module))
            slots[site.name] = MatrixSlot(site.name, module, site.stream, factors)
    if not slots:
        names = ", ".join(repr(expert.name) for expert in experts)
        raise InjectionError(f"None of the experts {names} has matrices for the {layout.part}.")
    return slots, unmatched


def _check_shapes(matrix: str, expert: str, pair: LoraFactors, shape: tuple[int, int]) -> None:
    down, up = pair.matrices
    found = (up.shape[0], down.shape[1])
    if found != shape:
        raise InjectionError(
            f"Expert {expert!r} does not fit {matrix!r}: its delta is {found[0]} x {found[1]}, the matrix "
            f"{shape[0]} x {shape[1]} (out x in); it was made for another base model."
        )


def build_bundles(slots: Mapping[str, MatrixSlot], layout: NetworkMap) -> list[Bundle]:
    sources: dict[str, list[MatrixSlot]] = {}
    for site in layout.sites:
        if site.name in slots:
            sources.setdefault(site.source, []).append(slots[site.name])
    return [Bundle(members) for members in sources.values()]
