"""`mixture="auto"`: what keeps a style and the subjects in it in balance while a picture forms.

Two LoRAs that never met draw either the subject or the style, and which of the two is decided anew in every
picture. How far each of them changes what the denoiser predicts tells which one is falling behind: it is led
on, as guidance leads on what a prompt changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import functional
from .context import ForwardContext
from .networks.base import Architecture
from .predictions import prediction_of, with_prediction
from .torch_state import is_compiling

#: Whom a prediction is made without.
Left = Literal["subjects", "styles"]

# Between these timesteps, from 1 (noise) to 0: before, nobody knows the places; afterwards details come.
_UNTIL, _FROM = 0.4, 0.8
# How far what is behind is led on, by how much it is behind, and at most: subjects and styles.
_GAIN, _SUBJECT, _STYLE = 4.5, 2.25, 0.7


def balanced(all_: Tensor, without: Callable[[Left], Tensor], weights: Tensor, balance: float) -> Tensor:
    """A prediction in which each subject is led on where the style is ahead of it, and the other way round.

    Args:
        all_: (R, C, H, W) what the denoiser predicts with everybody.
        without: the same without subjects or styles.
        weights: (R, H * W, N) how far each place is whose; 0 for experts that have no places.
        balance: by how much a subject changes its places, of what the style changes there, where neither is
            behind.
    Returns:
        (R, C, H, W).
    """
    subject, style = (all_ - without(one) for one in ("subjects", "styles"))
    weights = weights.to(all_)
    places = weights / weights.sum(1, keepdim=True).clamp_min(functional.EPS)
    shares = weights / weights.sum(-1, keepdim=True).clamp_min(functional.EPS)
    sizes = [
        torch.einsum("rt,rtn->rn", one.square().mean(1).flatten(1), places).sqrt() for one in (subject, style)
    ]
    ratio = sizes[0].clamp_min(functional.EPS) / sizes[1].clamp_min(functional.EPS)
    behind = (math.log(balance) - ratio.log()) * _GAIN
    lead = torch.stack([behind.clamp(0, _SUBJECT), (-behind).clamp(0, _STYLE)])
    led = torch.einsum("rtn,krn->krt", shares, lead)
    led = led.view(2, len(all_), 1, *all_.shape[-2:])
    return all_ + led[0] * subject + led[1] * style


@dataclass(frozen=True, eq=False)
class _Wanted:
    """What is to be done with a forward, see `Balance.begin`."""

    context: ForwardContext
    prompts: Tensor
    beside: Tensor
    weights: Callable[[int, int], Tensor]
    balance: float


class Balance:
    """Predicts again, without subjects and without styles, in some forwards, and changes what is predicted.

    Args:
        network: the denoiser.
        architecture: what it is.
        rows_apart: whether it may be run for some rows of a batch alone; else it is run for all.

    Attributes:
        left: whom the current forward leaves out; None for nobody.
    """

    def __init__(self, network: nn.Module, architecture: Architecture, *, rows_apart: bool) -> None:
        self.left: Left | None = None
        self._network, self._architecture, self._apart = network, architecture, rows_apart
        self._handles: list[RemovableHandle] = []
        self._given: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._wanted: _Wanted | None = None
        self._time, self._turn = 0.0, False

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._given = self._wanted = None

    def kept(self, weights: Tensor, everywhere: Tensor) -> Tensor:
        """Weights of experts, 0 for those whom the current forward leaves out.

        Args:
            weights: (B, T, N).
            everywhere: (B or 1, 1, N) 0 for the experts that do not count in the whole picture.
        """
        if self.left is None:
            return weights
        return weights * (everywhere != 0 if self.left == "subjects" else everywhere == 0)

    def rest(self) -> None:
        """A forward begins that is left as it is."""
        self._wanted = None

    def begin(
        self,
        context: ForwardContext,
        prompts: Tensor,
        beside: Tensor,
        weights: Callable[[int, int], Tensor],
        *,
        time: float,
        balance: float,
    ) -> None:
        """A forward begins that may be changed.

        Args:
            context: state of the mixture.
            prompts: (B,) which rows are prompts; on the CPU.
            beside: (B,) which rows' pictures have a style beside subjects.
            weights: (height, width) -> (B, height * width, N) of the places, see `balanced`.
            time: from 1 (noise) to 0.
            balance: see `balanced`; 0 for nothing.
        """
        self.rest()
        if self.left is not None or is_compiling() or balance == 0 or not bool(prompts.any()):
            return
        if not self._handles:
            self._handles = [
                self._network.register_forward_pre_hook(self._before, with_kwargs=True),
                self._network.register_forward_hook(self._after),
            ]
        if not _UNTIL <= time < _FROM:
            self._turn = False
            return
        if time != self._time:
            # Every second step is enough, and costs half.
            self._time, self._turn = time, not self._turn
        # What is on a GPU has to be waited for: not in every forward.
        if self._turn and bool((prompts & beside.cpu()).any()):
            self._wanted = _Wanted(context, prompts, beside, weights, balance)

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Networks take things out of the lists that they are given.
        self._given = None if self._wanted is None else _copied((args, kwargs))

    def _after(self, module: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
        given, wanted = self._given, self._wanted
        self._given = self._wanted = None
        if wanted is None or given is None:
            return None
        prediction, prompts = prediction_of(output), wanted.prompts
        if prediction.dim() != 4 or len(prediction) != len(prompts):
            return None
        # All prompts together: places are remembered by the pictures of a batch.
        rows = prompts.nonzero().flatten().to(prediction.device)

        def without(left: Left) -> Tensor:
            args, kwargs = _rows(given, rows, len(prompts)) if self._apart else _copied(given)
            with self._leaving(left, wanted.context):
                context = wanted.context
                context.begin(self._architecture.forward(args, kwargs, context.given_size))
                # Whoever hooks the network is to see what it was asked for alone.
                found = prediction_of(module.forward(*args, **kwargs))
            return (found if self._apart else found[rows]).float()

        own = wanted.weights(prediction.shape[-2], prediction.shape[-1])[rows]
        changed = balanced(prediction[rows].float(), without, own, wanted.balance).to(prediction)
        styled = wanted.beside[rows][:, None, None, None]
        changed = torch.where(styled, changed, prediction[rows])
        return with_prediction(output, prediction.index_copy(0, rows, changed))

    @contextmanager
    def _leaving(self, left: Left, context: ForwardContext) -> Iterator[None]:
        self.left = left
        try:
            with context.aside():
                yield
        finally:
            self.left = None


def _copied(given: Any) -> Any:
    """Arguments in containers of their own."""
    return _each(given, lambda tensor: tensor)


def _rows(given: Any, chosen: Tensor, count: int) -> Any:
    """Arguments for some rows of a batch."""
    return _each(given, lambda one: one[chosen.to(one.device)] if one.dim() and len(one) == count else one)


def _each(given: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(given, Tensor):
        return change(given)
    if type(given) in (list, tuple):
        return type(given)(_each(one, change) for one in given)
    if type(given) is dict:
        return {name: _each(one, change) for name, one in given.items()}
    return given
