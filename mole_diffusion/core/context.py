"""What one forward needs to know (active experts, scales, region masks) and what it leaves: gate weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import functional
from .errors import InjectionError, RegionMaskError

# The oldest supported torch can ask no device and knows these.
_is_autocast_available: Callable[[str], bool] = getattr(
    torch.amp, "is_autocast_available", lambda device: device in ("cpu", "cuda", "xpu")
)
_AUTOCAST_DEVICES = tuple(name for name in ("cpu", "cuda", "xpu", "mps") if _is_autocast_available(name))
# A UNet halves its latent at most this often.
_MAX_DEPTH = 8
# Newer than torch 2.1.
_is_compiling: Callable[[], bool] = getattr(torch.compiler, "is_compiling", lambda: False)


@dataclass(frozen=True)
class GateRecord:
    """Gate weights of one gate in one forward.

    Attributes:
        part: "unet" or "text_encoder".
        group: name of the gate's group; the gate of the text tokens in a group has the suffix ".context".
        step: what `Mixture.step` was.
        weights: (B, N) float32 on the CPU, mean over tokens; rows sum to 1.
    """

    part: str
    group: str
    step: int | None
    weights: Tensor


class RegionMasks:
    """Region masks of a picture, resized to any token grid on demand.

    Args:
        masks: expert index -> (H, W) in 0..1, validated.
        experts: N. Experts without a mask are allowed everywhere.
        active: indices of active experts; the others get 0.
    """

    def __init__(self, masks: Mapping[int, Tensor], experts: int, active: tuple[int, ...]) -> None:
        self._masks = dict(masks)
        self._experts = experts
        self._active = active
        self._grids: dict[tuple[int, int, torch.device], Tensor] = {}

    def check_aspect(self, latent_size: tuple[int, int]) -> None:
        """Raise RegionMaskError if a mask is not of the latent's proportions."""
        height, width = latent_size
        for mask in self._masks.values():
            rows, columns = mask.shape
            if rows * width != columns * height:
                raise RegionMaskError(
                    f"A region mask of {rows} x {columns} (height x width) does not have the proportions of "
                    f"the latent, {height} x {width}; draw it at the picture's size."
                )

    def on_grid(self, height: int, width: int, device: torch.device) -> Tensor:
        """(height * width, N) masks of a token grid."""
        key = (height, width, device)
        if key not in self._grids:
            with torch.inference_mode(False):
                columns = [self._column(index, height, width) for index in range(self._experts)]
                self._grids[key] = torch.stack(columns, dim=-1).to(device)
        return self._grids[key]

    def _column(self, index: int, height: int, width: int) -> Tensor:
        if index not in self._active:
            return torch.zeros(height * width)
        if index not in self._masks:
            return torch.ones(height * width)
        return functional.resize_mask(self._masks[index], (height, width)).flatten()


@dataclass(frozen=True)
class Activation:
    """The choice for the following forwards.

    Attributes:
        active: indices of active experts, ascending.
        scales: factor per expert, N long.
        fixed: weights per expert, N long, that replace the gates; None to use the gates.
        regions: region masks or None.
    """

    active: tuple[int, ...]
    scales: tuple[float, ...]
    fixed: tuple[float, ...] | None = None
    regions: RegionMasks | None = None


@dataclass
class GateValue:
    """What a gate said in the current forward.

    Attributes:
        weights: (B, T, N) gate weights before strength, scales and regions.
        strength: scalar as trained, or (B, T, 1) where the gates set it token by token; None where it does
            not apply (fixed weights).
        in_backward: whether a recomputation inside a backward pass computed it.
        expanded: rank weights by matrix layout, data type and number of tokens.
    """

    weights: Tensor
    strength: Tensor | None
    in_backward: bool
    expanded: dict[tuple[tuple[int, ...], torch.dtype, int], Tensor] = field(default_factory=dict)

    def pooled(self) -> GateValue:
        """The same with the mean weights over the tokens."""
        strength = self.strength
        if strength is not None and strength.dim() > 0:
            strength = strength.mean(1, keepdim=True)
        return GateValue(self.weights.mean(1, keepdim=True), strength, self.in_backward)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Gates are float32 and factors have the output's data type, also inside somebody's autocast."""
    if device.type in _AUTOCAST_DEVICES:
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def in_backward() -> bool:
    """Whether autograd is running, that is, whether a forward now is a recomputation."""
    if _is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)


class _Graph:
    """Lives as long as the autograd graph of one forward that has a gradient hook of it."""

    def __init__(self) -> None:
        self.finished = False

    def finish(self, gradient: Tensor) -> None:
        """The backward pass has come to the gate."""
        self.finished = True


class ForwardContext:
    """Mutable state shared by all hooks of one mixture.

    Args:
        part: "unet" or "text_encoder".
        experts: N.
    """

    def __init__(self, part: str, experts: int) -> None:
        self.part = part
        self.experts = experts
        self.enabled = True
        self.activation = Activation(tuple(range(experts)), (1.0,) * experts)
        self.given_size: tuple[int, int] | None = None
        self.latent_size: tuple[int, int] | None = None
        self.timestep: Tensor | float | None = None
        self.values: dict[str, GateValue] = {}
        self.live: dict[str, Tensor] = {}
        self.recording = False
        self.records: list[GateRecord] = []
        self.step: int | None = None
        self._graphs: weakref.WeakSet[_Graph] = weakref.WeakSet()
        self._tracked = False

    def begin(self, latent_size: tuple[int, int] | None, timestep: Tensor | float | None = None) -> None:
        """Start of a forward of the whole network."""
        self.timestep = timestep
        self.latent_size = self.given_size or latent_size
        if self.activation.regions is not None and self.latent_size is not None:
            self.activation.regions.check_aspect(self.latent_size)
        self.forget()

    def forget(self) -> None:
        """Drop what earlier gates said."""
        self.values.clear()
        self.live.clear()
        self._tracked = False

    def store(self, label: str, value: GateValue, *, trained: bool) -> GateValue:
        """Keep a gate's value for the rest of the group; note it unless it is a recomputation."""
        self.values[label] = value
        if trained and not value.in_backward:
            self.live[label] = value.weights.mean(1)
            if self.recording:
                weights = self.live[label].detach().float().cpu()
                self.records.append(GateRecord(self.part, label, self.step, weights))
            self._track(value.weights)
        return value

    def _track(self, weights: Tensor) -> None:
        """Notice a forward whose graph waits for a backward pass, once per forward."""
        if weights.requires_grad and not self._tracked and not _is_compiling():
            self._tracked = True
            graph = _Graph()
            weights.register_hook(graph.finish)  # type: ignore[no-untyped-call]
            self._graphs.add(graph)

    def fetch(self, label: str, matrix: str) -> GateValue:
        """The gate value that the group's first matrix left behind.

        Raises:
            InjectionError: the first matrix has not run, or it is unclear which forward is meant.
        """
        value = self.values.get(label)
        if value is None:
            raise InjectionError(
                f"{matrix!r} ran before the gate {label!r} was computed: the network does not run its "
                "matrices in the known order."
            )
        if in_backward() and not value.in_backward:
            waiting = sum(not graph.finished for graph in self._graphs)
            if waiting > 1:
                raise InjectionError(
                    f"Gradient checkpointing recomputes {matrix!r}, whose gate {label!r} was computed "
                    f"outside the checkpoint, and {waiting} forwards with gradient wait for a "
                    "backward pass: the recomputation cannot tell them apart. Run one forward with "
                    "gradient per backward pass (others under torch.no_grad()), or turn checkpointing off."
                )
        return value

    def token_grid(self, tokens: int) -> tuple[int, int]:
        """(height, width) of a group's image tokens.

        Raises:
            RegionMaskError: the latent size is unknown or does not lead to this number of tokens.
        """
        if self.latent_size is None:
            raise RegionMaskError("Region masks need the latent's size; pass latent_size=(height, width).")
        height, width = self.latent_size
        for _ in range(_MAX_DEPTH):
            if height * width == tokens:
                return height, width
            height, width = (height + 1) // 2, (width + 1) // 2
        raise RegionMaskError(
            f"{tokens} image tokens do not fit the latent of {self.latent_size[0]} x {self.latent_size[1]}."
        )
