"""Matrices of a network, and what each needs of the experts in a forward, made once per choice of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .caches import Plans, TensorCache
from .context import Activation
from .dora import Dora, is_plain
from .factors import LoraFactors, swap_halves
from .modules import kernel_size, site_shape
from .networks.base import NetworkMap
from .ranks import (
    GateFactors,
    Layouts,
    SharedDown,
    down_bytes,
    gate_factors,
    rank_rows,
    share_down,
)
from .routing import Route


@dataclass(frozen=True, eq=False)
class MatrixPlan:
    """What a matrix needs of the experts while the choice of experts, the device and the data type stay.

    Attributes:
        up: (R, d_out) up factors of the active experts with scaling; None where none has the matrix.
        columns: (R,) places of the active experts' ranks among those projected; None for all of them.
        layout: number of the layout, see `Layouts`, and the device.
        owners: (N, R) one-hot owner of each rank, float32.
    """

    up: Tensor | None
    columns: Tensor | None
    layout: tuple[int, torch.device]
    owners: Tensor


@dataclass(eq=False)
class MatrixSlot:
    """One matrix of the network and the factors that the experts have for it.

    Attributes:
        name: canonical name.
        module: the Linear or Convolution that is hooked (inside any PEFT wrapper).
        stream: "tokens", "context", "joint" or "embedding".
        factors: expert index -> factors.
        rows: rows of the module's output that are this matrix; None for all.
        swapped: whether the module has their halves in the other order than the factors.
        source: matrices of equal source read the same tensor.
        folds, amid: see `Site`.
        may_lead: whether its gate is read off it where another matrix of the same source could do.
        leads: whether it computes a gate of its group from its own rank activations.
        doras: expert index -> what its factors are computed from, beside the module's weight.
        answers: whether that gate is asked in forwards with the present choice.
        place: of this matrix among those of its bundle whose down factors are multiplied.
        used: active experts that have this matrix.
        read: experts whose down factors are multiplied: all if the gate reads them, else the active ones.
    """

    name: str
    module: nn.Module
    stream: str
    factors: Mapping[int, LoraFactors]
    rows: slice | None = None
    swapped: bool = False
    source: str = ""
    folds: bool = False
    amid: bool = False
    may_lead: bool = True
    leads: bool = False
    answers: bool = False
    place: int = -1
    used: tuple[int, ...] = ()
    read: tuple[int, ...] = ()
    doras: Mapping[int, Dora] = field(default_factory=dict)
    cache: TensorCache = field(default_factory=TensorCache)
    plans: Plans[MatrixPlan] = field(default_factory=Plans)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in); a kernel does not count."""
        return site_shape(self.module, self.rows)

    def choose(self, activation: Activation) -> None:
        """Be ready for forwards with these experts."""
        self.used = self.read = self.mixed(activation.active)
        self.answers = self.leads and activation.gated and len(activation.active) > 1
        if self.answers:
            self.read = tuple(self.factors)
        self.plans.choose((self.read, self.used))

    def measure(self, weight: Any) -> None:
        """Compute the factors of DoRA experts anew, from another weight of the module."""
        weight = weight_of(weight, swapped=self.swapped)
        self.factors = {**self.factors, **{i: one.plain(weight, self.rows) for i, one in self.doras.items()}}
        self.cache.clear()

    def mixed(self, active: tuple[int, ...]) -> tuple[int, ...]:
        """Those of the active experts that have this matrix."""
        return tuple(i for i in active if i in self.factors)

    def plan(self, layouts: Layouts, device: torch.device, dtype: torch.dtype) -> MatrixPlan:
        """What is needed where the output is on this device and of this data type."""
        return self.plans.get(device, dtype, lambda: self._plan(layouts, device, dtype))

    def _plan(self, layouts: Layouts, device: torch.device, dtype: torch.dtype) -> MatrixPlan:
        owners = self._owners(self.used)
        columns = None
        if self.used != self.read:
            chosen = [k for k, owner in enumerate(self._owners(self.read)) if owner in self.used]
            columns = torch.tensor(chosen, device=device)
        up = self.up(self.used, device, dtype) if self.used else None
        return MatrixPlan(up, columns, (layouts.number(owners), device), layouts.one_hot(owners, device))

    def _owners(self, experts: tuple[int, ...]) -> tuple[int, ...]:
        """Owner of each rank."""
        return tuple(i for i in experts for _ in range(self.factors[i].width))

    def up(self, experts: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        """(R, d_out) concatenated up factors with scaling."""

        def build() -> Tensor:
            scaled = torch.cat([self.factors[i].weighted_up() for i in experts], dim=1)
            scaled = swap_halves(scaled) if self.swapped else scaled
            return scaled.T.to(device, dtype).contiguous()

        return self.cache.get(("up", experts, device, dtype), build)

    def gate_factors(self, experts: int, device: torch.device) -> GateFactors:
        """What the gate of N experts needs to read their outputs in rank space."""
        return self.cache.get(("gate", device), lambda: gate_factors(self.factors, experts, device))

    def route_factors(self, route: Route, device: torch.device) -> Tensor:
        """What a route needs to score the active experts, see `Route.factors`."""
        used = {i: self.factors[i] for i in self.used}
        return self.cache.get(
            ("route", route.kind, self.used, device), lambda: route.factors(used).to(device)
        )

    @property
    def keeps(self) -> bool:
        """Whether it keeps anything on a device."""
        return bool(self.plans.places) or bool(self.cache)

    def release(self) -> None:
        """Let go of everything on a device."""
        self.cache.clear()
        self.plans.clear()


def weight_of(weight: Any, *, swapped: bool) -> Any:
    """A module's weight with its rows in the canonical order, as far as there are any to see."""
    return swap_halves(weight) if swapped and is_plain(weight) else weight


class Bundle:
    """Matrices that read the very same tensor (to_q, to_k, to_v): one product serves them all.

    Args:
        slots: the matrices in execution order.
    """

    def __init__(self, slots: list[MatrixSlot]) -> None:
        self.slots = slots
        self._plans: Plans[SharedDown] = Plans()
        self._wanted: list[MatrixSlot] = []
        self._input: Tensor | None = None
        self._folded: tuple[Tensor, Tensor] | None = None
        # By place, not by name: see `Voice`.
        self._parts: list[Tensor | None] = []
        self._waiting = 0

    def choose(self, activation: Activation) -> None:
        """Be ready for forwards with these experts."""
        for slot in self.slots:
            slot.choose(activation)
        self._wanted = [slot for slot in self.slots if slot.read]
        for place, slot in enumerate(self._wanted):
            slot.place = place
        self._plans.choose(tuple((slot.name, slot.read) for slot in self._wanted))

    def prepare(self, layouts: Layouts, experts: int, compiled_on: torch.device | None) -> None:
        """Make ready what the next forward needs, as far as earlier ones told where it will run.

        Args:
            layouts: of the mixture.
            experts: N.
            compiled_on: where the network computes if parts of it are compiled, which are to find everything
                ready in the first forward too; else None.
        """
        for slot in self.slots:
            places = slot.plans.places
            dtype = getattr(getattr(slot.module, "weight", None), "dtype", None)
            if compiled_on is not None and not places and dtype is not None and dtype.is_floating_point:
                places = [(compiled_on, dtype)]
            for device, dtype in places:
                slot.plan(layouts, device, dtype)
                if slot.read:
                    self._plan(device, dtype)
                if compiled_on is not None and slot.answers:
                    slot.gate_factors(experts, device)

    def make_ready(self, layouts: Layouts, device: torch.device, dtype: torch.dtype) -> None:
        """Make now what forwards with the present choice need on a device.

        Args:
            layouts: of the mixture.
            device, dtype: of the outputs.
        """
        for slot in self.slots:
            slot.plan(layouts, device, dtype)
        if self._wanted:
            self._plan(device, dtype)

    def device_bytes(self, item: int) -> int:
        """Bytes of the factors that forwards with the present choice keep on a device.

        Args:
            item: bytes of one number of the outputs.
        """
        down = down_bytes([[slot.factors[i] for i in slot.read] for slot in self._wanted], item)
        ups = (slot.shape[0] * sum(slot.factors[i].width for i in slot.used) for slot in self.slots)
        return down + item * sum(ups)

    def project(self, slot: MatrixSlot, x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Rank activations (B * L, R) of `slot` for its input x (B, L, d).

        They are handed out once; `peek` leaves them there.

        Args:
            slot: one of the matrices.
            x: their input.
            device, dtype: of the output.
        """
        part = self.peek(slot, x, device, dtype)
        self._parts[slot.place] = None
        self._waiting -= 1
        if self._waiting == 0:
            self.clear()
        return part

    def peek(self, slot: MatrixSlot, x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """As `project`, for a matrix that runs later on the same input."""
        part = self._parts[slot.place] if self._input is x else None
        if part is None:
            plan = self._plan(device, dtype)
            parts = plan.parts(rank_rows(slot.module, x, plan))
            self._parts, self._waiting, self._input = list(parts), len(parts), x
            part = parts[slot.place]
        return part

    def alone(
        self, slot: MatrixSlot, expert: int, x: Tensor, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """As `project`, of one expert for one matrix; its input is another one for every expert."""
        factors = slot.cache.get(
            ("down", expert, device, dtype),
            lambda: share_down(slot.module, [[slot.factors[expert]]], device, dtype),
        )
        return rank_rows(slot.module, x, factors)

    def clear(self) -> None:
        """Let go of tensors that an interrupted forward left behind."""
        self._input = self._folded = None
        self._parts = []
        self._waiting = 0

    def fold(self, x: Tensor, pictures: int) -> Tensor:
        """(B, L, in) of an input with other axes beside these; the same tensor for all matrices that read it.

        Args:
            x: the input.
            pictures: B.
        """
        if self._folded is None or self._folded[0] is not x:
            self._folded = x, x.reshape(pictures, -1, x.shape[-1])
        return self._folded[1]

    def release(self) -> None:
        """Let go of everything on a device."""
        self.clear()
        self._plans.clear()
        for slot in self.slots:
            slot.release()

    def _plan(self, device: torch.device, dtype: torch.dtype) -> SharedDown:
        def build() -> SharedDown:
            factors = [[slot.factors[i] for i in slot.read] for slot in self._wanted]
            return share_down(self.slots[0].module, factors, device, dtype)

        return self._plans.get(device, dtype, build)


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
