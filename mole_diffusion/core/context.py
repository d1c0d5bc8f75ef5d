"""What one forward needs to know (active experts, scales, region masks) and what it leaves: gate weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from . import functional
from .errors import InjectionError, RegionMaskError
from .networks.base import Forward
from .ranks import Layouts
from .regions import RegionMasks
from .routing import Route
from .torch_state import in_backward, is_compiling, on_device
from .values import Expanded, GateValue, Voice


class Following(Protocol):
    """What is told of every forward of a network."""

    def begin(self, context: ForwardContext, forward: Forward) -> None:
        """A forward of the whole network begins."""


class TokenShares(Following, Protocol):
    """Weights that replace the gates, token by token, made anew in every forward.

    Attributes:
        by_place: whether it matters which gate's place they take.
    """

    by_place: bool

    def value(self, context: ForwardContext, stream: str, tokens: int, place: str) -> GateValue:
        """Weights of the tokens of a stream.

        Args:
            context: state of the mixture.
            stream: "tokens", "context" or "embedding".
            tokens: L.
            place: what it is called, see `Group.place`; "" where it does not matter.
        """

    def remove(self) -> None:
        """They count no longer: take away what was put on the network."""


@dataclass(frozen=True, eq=False)
class Activation:
    """The choice for the following forwards.

    Numbers are tensors, so that a compiled network is not compiled anew for each; what decides the path
    through the hooks is not.

    Attributes:
        active: indices of active experts, ascending.
        scales: (N,) factor per expert; None where all are 1.
        fixed: (N,) weights per expert that replace the gates; None to use the gates.
        regions: region masks or None.
        mask: (N,) True for active experts; None where all are.
        route: how each matrix weighs the experts by itself, in place of the gates; None to use the gates.
        shares: weights of single tokens that replace the gates; None to use the gates.
        balance: looks after what is predicted with the gates; None for nothing.
    """

    active: tuple[int, ...]
    scales: Tensor | None = None
    fixed: Tensor | None = None
    regions: RegionMasks | None = None
    mask: Tensor | None = None
    route: Route | None = None
    shares: TokenShares | None = None
    balance: Following | None = None

    @property
    def gated(self) -> bool:
        """Whether gates have a say."""
        return self.fixed is None and self.shares is None

    def remove(self) -> None:
        """It counts no longer: take away what was put on the network."""
        if self.shares is not None:
            self.shares.remove()

    def to(self, device: torch.device) -> Activation:
        """The same with its tensors on a device."""
        scales, fixed, mask = (
            None if value is None else value.to(device) for value in (self.scales, self.fixed, self.mask)
        )
        return replace(self, scales=scales, fixed=fixed, mask=mask)


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
        part: what the host calls the network.
        experts: N.

    Attributes:
        chosen: whether the experts were chosen anew since the last forward.
        voices: of all gates, in execution order.
        change: what changes the prediction of the current forward, from the network, what it was called with
            and what it returned; None for nothing.
    """

    def __init__(self, part: str, experts: int) -> None:
        self.part = part
        self.experts = experts
        self.enabled = True
        self.chosen = False
        self.layouts = Layouts(experts)
        self.activation = Activation(tuple(range(experts)))
        self.given_size: tuple[int, int] | None = None
        self.forward = Forward()
        self.voices: list[Voice] = []
        self.change: Callable[[Any, Any, Any], Any] | None = None
        self._time: Tensor | None = None
        self._pooled: tuple[Tensor | None, dict[str, tuple[list[int], GateValue]]] = (None, {})
        self._real: dict[str, Tensor] = {}
        self._graphs: weakref.WeakSet[_Graph] = weakref.WeakSet()
        self._tracked = False

    @property
    def values(self) -> dict[str, GateValue]:
        """What gates said last in the current forward, by label."""
        return {voice.label: voice.value for voice in self.voices if voice.value is not None}

    @property
    def live(self) -> dict[str, GateValue]:
        """The same, of the forward itself and not of recomputations."""
        return {voice.label: voice.live for voice in self.voices if voice.live is not None}

    @property
    def activation(self) -> Activation:
        """The choice for the following forwards."""
        return self._activation

    @activation.setter
    def activation(self, activation: Activation) -> None:
        self._activation = activation
        self._forget_constants()

    def _forget_constants(self) -> None:
        """Drop what depends on the choice of experts alone."""
        self._fixed: GateValue | None = None
        self._pooled = (None, {})
        self._equal: tuple[Tensor, Expanded] | None = None

    def release(self) -> None:
        """Let go of what the next forward can make again, and of what the last one left behind."""
        self.layouts.release()
        self._forget_constants()
        self.forward = Forward()
        self._time = None
        self._real.clear()
        self.forget()

    def begin(self, forward: Forward) -> None:
        """Start of a forward of the whole network."""
        self.forward = forward
        if self.activation.regions is not None:
            # Their grids depend on the latent.
            self._forget_constants()
            if forward.size is not None:
                self.activation.regions.check_aspect(forward.size)
        self._time = None
        self._real = {stream: self._shares_of_mean(mask) for stream, mask in forward.masks.items()}
        self.forget()
        for one in (self.activation.shares, self.activation.balance):
            if one is not None:
                one.begin(self, forward)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Let forwards inside the `with` block leave what the last one before it left."""
        forward, time, real, tracked = self.forward, self._time, self._real, self._tracked
        said = [(voice, voice.value, voice.live) for voice in self.voices]
        try:
            yield
        finally:
            self.forward, self._time, self._real, self._tracked = forward, time, real, tracked
            for voice, value, live in said:
                voice.value, voice.live = value, live

    def forget(self) -> None:
        """Drop what earlier gates said."""
        for voice in self.voices:
            voice.value = voice.live = None
        self._tracked, self.change = False, None

    def fixed(self, device: torch.device) -> GateValue:
        """The weights that replace the gates, the same in every forward."""
        found = None if is_compiling() else self._fixed
        if found is None:
            assert self.activation.fixed is not None
            rows = on_device(self.activation.fixed, device).view(1, -1)
            found = GateValue(rows, 1, None, in_backward=False)
        if not is_compiling():  # what is kept here would change what was traced
            self._fixed = found
        return found

    def equal(self, batch: int, device: torch.device) -> GateValue:
        """The weights where no gate has a say, the same in every forward: equal for active experts."""
        found = None if is_compiling() else self._equal
        if found is None:
            mask = self.activation.mask
            rows = torch.ones(1, self.experts) if mask is None else mask.float().view(1, -1)
            found = on_device(rows / len(self.activation.active), device), {}
        if not is_compiling():
            self._equal = found
        return GateValue(found[0], batch, None, in_backward(), expanded=found[1])

    def store(self, voice: Voice, value: GateValue) -> GateValue:
        """Keep a gate's value for the rest of the group; note it unless it is a recomputation."""
        voice.value = value
        if not value.in_backward:
            # Means are taken when asked for: a recomputation must keep the same tensors for autograd.
            voice.live = value
            self._track(value.rows)
        return value

    def pooled(self, label: str, versions: list[int]) -> GateValue | None:
        """What the gate of a causal network's context said in an earlier step; None where it is to be asked.

        Args:
            label: of the gate.
            versions: of its parameters.
        """
        if (
            is_compiling()
            or self.forward.memory is None
            or self.forward.memory is not self._pooled[0]
            or torch.is_grad_enabled()
        ):
            return None
        kept, value = self._pooled[1].get(label, ([], None))
        return value if kept == versions else None

    def keep_pooled(self, label: str, versions: list[int], value: GateValue) -> None:
        """Keep that for the steps to come, which have the same context."""
        if torch.is_grad_enabled() or is_compiling():
            return
        if self.forward.memory is not self._pooled[0]:
            self._pooled = (self.forward.memory, {})
        self._pooled[1][label] = versions, value

    def _track(self, weights: Tensor) -> None:
        """Notice a forward whose graph waits for a backward pass, once per forward."""
        if not is_compiling() and weights.requires_grad and not self._tracked:
            self._tracked = True
            graph = _Graph()
            weights.register_hook(graph.finish)  # type: ignore[no-untyped-call]
            self._graphs.add(graph)

    def fetch(self, voice: Voice, matrix: str) -> GateValue:
        """The gate value that the group's first matrix left behind.

        Raises:
            InjectionError: the first matrix has not run, or it is unclear which forward is meant.
        """
        value = voice.value
        if value is None:
            raise InjectionError(
                f"{matrix!r} ran before the gate {voice.label!r} was computed: the network does not run its "
                "matrices in the known order."
            )
        if in_backward() and not value.in_backward:
            waiting = sum(not graph.finished for graph in self._graphs)
            if waiting > 1:
                raise InjectionError(
                    f"Gradient checkpointing recomputes {matrix!r}, whose gate {voice.label!r} was computed "
                    f"outside the checkpoint, and {waiting} forwards with gradient wait for a "
                    "backward pass: the recomputation cannot tell them apart. Run one forward with "
                    "gradient per backward pass (others under torch.no_grad()), or turn checkpointing off."
                )
        return value

    def time_features(self, device: torch.device) -> Tensor:
        """(B or 1, 1, TIMESTEP_FEATURES) of the timestep, once per forward.

        Raises:
            InjectionError: the network was called without one.
        """
        if self._time is None:
            timestep = self.forward.timestep
            if timestep is None:
                raise InjectionError("Gates that read the timestep need the network to be called with one.")
            time = torch.as_tensor(timestep, device=device).reshape(-1, 1)
            self._time = functional.timestep_features(time)
        return self._time

    @staticmethod
    def _shares_of_mean(mask: Tensor) -> Tensor:
        """(B, L, 1) from (B, L) where tokens are real."""
        kept = mask.float().unsqueeze(-1)
        return kept / kept.sum(1, keepdim=True).clamp_min(1.0)

    def real_tokens(self, stream: str, like: Tensor, *, folded: bool = False) -> Tensor | None:
        """(B, L, 1) share of each token of a stream in a mean: 0 for padding; None where all are real.

        Args:
            like: (B, L, ...) something of these tokens.
            folded: whether another axis is folded into them, behind them.
        Raises:
            InjectionError: the mask is of other tokens.
        """
        if stream not in self._real:
            return None
        real = on_device(self._real[stream], like.device)
        appended = self.forward.appended.get(stream, 0)
        if appended and like.shape[1] == real.shape[1] - appended:
            real = real[:, :-appended]
        if folded and like.shape[1] % real.shape[1] == 0:
            times = like.shape[1] // real.shape[1]
            real = real.repeat_interleave(times, dim=1) / times
        if real.shape[:2] != like.shape[:2]:
            theirs, ours = (" x ".join(map(str, tensor.shape[:2])) for tensor in (real, like))
            raise InjectionError(
                f"The mask of the {stream} of the {self.part} is for {theirs} tokens (batch x length) and "
                f"its matrices read {ours}: which of them are padding is unclear."
            )
        return real

    def span(self, stream: str, tokens: int) -> slice:
        """Where the tokens of a stream lie in a joint sequence.

        Raises:
            InjectionError: that is unknown, or the sequence has other tokens too.
        """
        spans = self.forward.spans
        if stream not in spans or sum(one.stop - one.start for one in spans.values()) != tokens:
            known = ", ".join(f"{name} {one.start} to {one.stop}" for name, one in spans.items()) or "nothing"
            raise InjectionError(
                f"A sequence of {tokens} tokens of the {self.part} holds text and image together, and the "
                f"network's inputs say of their places: {known}. Run the whole network."
            )
        return spans[stream]

    def references(self, tokens: int) -> int:
        """How many of a group's image tokens, the last ones, are not of the picture that is drawn."""
        references = self.forward.references
        if references and self.forward.grid is not None and self.forward.grid(tokens) is not None:
            return 0  # matrices that read the picture before anything is put behind it
        return references

    def region_masks(self, regions: RegionMasks, tokens: int, device: torch.device) -> Tensor:
        """(tokens, N) region masks of a group's image tokens.

        Raises:
            RegionMaskError: see `token_grid`.
        """
        references = self.references(tokens)
        masks = regions.on_grid(*self.token_grid(tokens - references), device)
        return torch.cat([masks, regions.everywhere(references, device)]) if references else masks

    def token_grid(self, tokens: int) -> tuple[int, int]:
        """(height, width) of a group's image tokens.

        Raises:
            RegionMaskError: the latent size is unknown or does not lead to this number of tokens.
        """
        if self.forward.grid is None:
            raise RegionMaskError("Region masks need the latent's size; pass latent_size=(height, width).")
        found = self.forward.grid(tokens)
        if found is None:
            size = " x ".join(map(str, self.forward.size or ()))
            raise RegionMaskError(f"{tokens} image tokens do not fit the latent of {size}.")
        return found
