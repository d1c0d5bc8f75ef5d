"""Matrices of a network and the experts' factors for them, concatenated and cast once."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import functional
from .architectures import ATTENTION, UNET, MatrixSite, NetworkMap
from .bases import check_fit
from .context import Activation
from .errors import InjectionError
from .experts import Expert, LoraFactors
from .keys import relocate

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

    def down(self, experts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """(R, in) concatenated down factors and (R,) what is added to their products, float32."""
        chosen = [self.factors[i] for i in experts]
        return torch.cat([f.rows() for f in chosen]), torch.cat([f.offset() for f in chosen])

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
        """Rank activations (B, L, R) of `slot` for its input x (B, L, d), in the data type of `like`."""
        if self._input is not x or slot.name not in self._parts:
            rows = {s.name: experts for s in self.slots if (experts := s.projected(activation))}
            z = rank_activations(slot.module, x, *self._down(rows, like))
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

    def release(self) -> None:
        """Let go of everything on a device."""
        self.clear()
        self._cache.clear()

    def _down(self, rows: dict[str, tuple[int, ...]], like: Tensor) -> tuple[Tensor, Tensor | None]:
        def build() -> tuple[Tensor, Tensor | None]:
            parts = [s.down(rows[s.name]) for s in self.slots if s.name in rows]
            down, offset = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            down = down.to(like.device, like.dtype).contiguous()
            return down, offset.to(like.device, like.dtype) if offset.any() else None

        return self._cache.get((tuple(rows.items()), like.device, like.dtype), build)


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


def kernel_size(module: nn.Module) -> tuple[int, int] | None:
    """(height, width) of a convolution's kernel; None for 1x1 and for Linears, which are plain products."""
    kernel: Any = getattr(module, "kernel_size", None)
    return None if kernel is None or tuple(kernel) == (1, 1) else tuple(kernel)


def base_layer(module: nn.Module) -> nn.Module:
    """The layer inside any number of PEFT wrappers."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a Linear or convolution, also quantised or offloaded; a kernel does not count."""
    for names in (("out_features", "in_features"), ("out_channels", "in_channels")):
        if all(hasattr(module, name) for name in names):
            return int(getattr(module, names[0])), int(getattr(module, names[1]))
    weight: Any = module.weight
    return int(weight.shape[0]), int(weight.shape[1])


def fingerprint(network: nn.Module, layout: NetworkMap) -> dict[str, str]:
    """What a network is: its class, and hashes of its matrices' canonical names and shapes.

    Returns:
        "class"; "shapes" of the transformers' matrices, which files of format 1 have; "matrices" of all.
    """
    # Some hosts give every text encoder a projection, also where the base has none.
    sites = [site for site in layout.sites if site.name != "text_projection"]
    return {
        "class": type(network).__name__,
        "shapes": _hash_shapes(network, [site for site in sites if site.kind == ATTENTION], matrix_shape),
        "matrices": _hash_shapes(network, sites, _delta_shape),
    }


def _hash_shapes(
    network: nn.Module, sites: Sequence[MatrixSite], shape_of: Callable[[nn.Module], tuple[int, int]]
) -> str:
    digest = hashlib.sha256()
    for site in sorted(sites, key=lambda site: site.name):
        digest.update(f"{site.name} {shape_of(base_layer(network.get_submodule(site.path)))};".encode())
    return digest.hexdigest()


def build_slots(
    network: nn.Module, experts: Sequence[Expert], layout: NetworkMap
) -> tuple[dict[str, MatrixSlot], dict[str, tuple[str, ...]]]:
    """Matrices that an expert has, in execution order, and the experts' matrices without a place.

    Raises:
        InjectionError: an expert was made for another network, or DoRA lacks the base's weights.
    """
    modules = {site.name: base_layer(network.get_submodule(site.path)) for site in layout.sites}
    shapes = {name: _delta_shape(module) for name, module in modules.items()}
    owned = [_placed(expert, layout) for expert in experts]
    unmatched = {}
    for expert, own in zip(experts, owned, strict=True):
        check_fit(expert, own, shapes, layout.part, type(network).__name__)
        unmatched[expert.name] = tuple(name for name in own if name not in shapes)
    slots: dict[str, MatrixSlot] = {}
    for site in layout.sites:
        module = modules[site.name]
        factors = {
            i: _exact(own[site.name], module, site.name, experts[i].name)
            for i, own in enumerate(owned)
            if site.name in own
        }
        if factors:
            slots[site.name] = MatrixSlot(site.name, module, site.stream, factors)
    if not slots:
        names = ", ".join(repr(expert.name) for expert in experts)
        raise InjectionError(f"None of the experts {names} has matrices for the {layout.part}.")
    return slots, unmatched


def _delta_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a delta of the module's weight; a kernel counts as input."""
    out, fan_in = matrix_shape(module)
    return out, fan_in * math.prod(kernel_size(module) or (1,))


def _placed(expert: Expert, layout: NetworkMap) -> dict[str, LoraFactors]:
    """Factors by the matrix names of this network: LDM names were read for two residual blocks per level."""
    own = dict(expert.factors.get(layout.part, {}))
    if layout.part != UNET or not expert.ldm_blocks or set(layout.layers) == {2}:
        return own
    blocks = expert.ldm_blocks
    return {
        relocate(name, blocks[name], layout.layers) if name in blocks else name: factors
        for name, factors in own.items()
    }


def _exact(factors: LoraFactors, module: nn.Module, matrix: str, expert: str) -> LoraFactors:
    """Factors that need no base weight any more; those of DoRA are computed from it."""
    if factors.magnitude is None:
        return factors
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta or not weight.is_floating_point():
        raise InjectionError(
            f"Expert {expert!r} is a DoRA and {matrix!r} of the network has no plain weights in memory "
            "(quantised or offloaded): what a DoRA adds is computed from them. Load the expert first, then "
            "offload; a quantised base cannot take it."
        )
    if factors.magnitude.per_input and factors.magnitude.values.numel() != weight.shape[1]:
        raise InjectionError(
            f"Expert {expert!r} does not fit {matrix!r}: it has DoRA magnitudes for "
            f"{factors.magnitude.values.numel()} inputs, the matrix has {weight.shape[1]}."
        )
    return factors.against(weight)


def build_bundles(slots: Mapping[str, MatrixSlot], layout: NetworkMap) -> list[Bundle]:
    """The matrices in bundles of those that read the very same tensor."""
    sources: dict[str, list[MatrixSlot]] = {}
    for site in layout.sites:
        if site.name in slots:
            sources.setdefault(site.source, []).append(slots[site.name])
    return [Bundle(members) for members in sources.values()]
