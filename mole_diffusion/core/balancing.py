"""What keeps a style and the subjects in it in balance while a picture forms.

Two LoRAs that never met draw either the subject or the style, and which of the two is decided anew in every
picture. How far each of them changes what the denoiser predicts tells which one is falling behind: it is led
on, as guidance leads on what a prompt changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import functional
from .context import ForwardContext
from .networks.base import Architecture
from .predictions import by_place, like_prediction, prediction_of, with_prediction
from .torch_state import is_compiling

#: Whom a prediction is made without.
Left = Literal["subjects", "styles"]

# Between these timesteps, from 1 (noise) to 0: before, nobody knows the places; afterwards details come.
_UNTIL, _FROM = 0.4, 0.8
# How far what is behind is led on, by how much it is behind.
_GAIN = 4.5


@dataclass(frozen=True)
class Lead:
    """How what falls behind is led on.

    Attributes:
        balance: by how much a subject changes its places, of what the style changes there, where neither is
            behind; 0 leaves them alone.
        subject: how far a subject is led on at most, by how much it changes.
        style: the same of a style.
    """

    balance: float
    subject: float = 2.25
    style: float = 0.7


def balanced(all_: Tensor, without: Callable[[Left], Tensor], weights: Tensor, lead: Lead) -> Tensor:
    """A prediction in which each subject is led on where the style is ahead of it, and the other way round.

    Args:
        all_: (R, T, C) what the denoiser predicts with everybody, place by place.
        without: the same without subjects or styles.
        weights: (R, T, N) how far each place is whose; 0 for experts that have no places.
        lead: how.
    Returns:
        (R, T, C).
    """
    subject, style = (all_ - without(one) for one in ("subjects", "styles"))
    weights = weights.to(all_)
    places = weights / weights.sum(1, keepdim=True).clamp_min(functional.EPS)
    shares = weights / weights.sum(-1, keepdim=True).clamp_min(functional.EPS)
    sizes = [torch.einsum("rt,rtn->rn", one.square().mean(-1), places).sqrt() for one in (subject, style)]
    ratio = sizes[0].clamp_min(functional.EPS) / sizes[1].clamp_min(functional.EPS)
    behind = (math.log(lead.balance) - ratio.log()) * _GAIN
    far = torch.stack([behind.clamp(0, lead.subject), (-behind).clamp(0, lead.style)])
    led = torch.einsum("rtn,krn->krt", shares, far).unsqueeze(-1)
    return all_ + led[0] * subject + led[1] * style


@dataclass(frozen=True, eq=False)
class Wanted:
    """What is to be done with a forward.

    Args:
        prompts: (B,) which rows are prompts; on the CPU.
        beside: (B,) which rows' pictures have a style beside subjects.
        styles: (N,) True for the experts of the whole picture.
        weights: a prediction -> (B, T, N) of its places, see `balanced`.
        time: from 1 (noise) to 0.
        lead: how.
    """

    prompts: Tensor
    beside: Tensor
    styles: Tensor
    weights: Callable[[Tensor], Tensor]
    time: float
    lead: Lead


#: What a network was called with: positional arguments and those by name.
Given = tuple[tuple[Any, ...], dict[str, Any]]


class ChangeHook:
    """Hooks of a denoiser through which what it predicts is changed, where `ForwardContext.change` says how.

    They stay on as long as the mixture's own: none may come or go in the middle of a forward, where hosts
    choose experts too.

    Args:
        context: state of the mixture.
    """

    def __init__(self, context: ForwardContext) -> None:
        self._context = context
        self._given: Given | None = None

    def register(self, network: nn.Module) -> list[RemovableHandle]:
        """Put them on."""
        return [
            network.register_forward_pre_hook(self._before, with_kwargs=True),
            network.register_forward_hook(self._after),
        ]

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Networks take things out of the lists that they are given. The mixture may be told of the forward
        # after this hook.
        activation = self._context.activation
        wanted = not is_compiling() and (activation.shares is not None or activation.balance is not None)
        self._given = _copied((args, kwargs)) if wanted else None

    def _after(self, module: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
        given, change = self._given, self._context.change
        self._given = self._context.change = None
        return None if given is None or change is None else change(module, given, output)


class Balance:
    """Predicts again, without subjects and without styles, in some forwards, and changes what is predicted.

    Args:
        architecture: what the denoiser is.
        rows_apart: whether it may be run for some rows of a batch alone; else it is run for all.

    Attributes:
        left: whom the current forward leaves out; None for nobody.
    """

    def __init__(self, architecture: Architecture, *, rows_apart: bool) -> None:
        self.left: Left | None = None
        self._architecture, self._apart = architecture, rows_apart
        self._time, self._turn = 0.0, False

    def begin(self, context: ForwardContext, wanted: Wanted) -> None:
        """A forward begins that may be changed.

        Args:
            context: state of the mixture.
            wanted: how.
        """
        if self.left is not None or is_compiling() or wanted.lead.balance == 0:
            return
        if not bool(wanted.prompts.any()):
            return
        if not _UNTIL <= wanted.time < _FROM:
            self._turn = False
            return
        if wanted.time != self._time:
            # Every second step is enough, and costs half.
            self._time, self._turn = wanted.time, not self._turn
        # What is on a GPU has to be waited for: not in every forward.
        if self._turn and bool((wanted.prompts & wanted.beside.cpu()).any()):
            context.change = partial(self._changed, context, wanted)

    def _changed(
        self, context: ForwardContext, wanted: Wanted, module: nn.Module, given: Given, output: Any
    ) -> Any:
        prediction, prompts = prediction_of(output), wanted.prompts
        if len(prediction) != len(prompts):
            return None
        # All prompts together: places are remembered by the pictures of a batch.
        rows = prompts.nonzero().flatten().to(prediction.device)
        # Some networks are given lists of pictures.
        first = next(iter((*given[0], *given[1].values())), None)
        apart = self._apart and len(rows) < len(prompts) and isinstance(first, Tensor)

        def without(left: Left) -> Tensor:
            args, kwargs = _rows(given, rows, len(prompts)) if apart else _copied(given)
            with self._leaving(left, context, wanted.styles.to(prediction.device)):
                context.begin(self._architecture.forward(args, kwargs, context.given_size))
                # Whoever hooks the network is to see what it was asked for alone.
                found = prediction_of(module.forward(*args, **kwargs))
            return by_place(found if apart else found[rows]).float()

        own, all_ = wanted.weights(prediction)[rows], by_place(prediction[rows])
        changed = balanced(all_.float(), without, own, wanted.lead).to(prediction)
        changed = torch.where(wanted.beside[rows][:, None, None], changed, all_)
        laid = like_prediction(changed, prediction[rows])
        return with_prediction(output, prediction.index_copy(0, rows, laid))

    @contextmanager
    def _leaving(self, left: Left, context: ForwardContext, styles: Tensor) -> Iterator[None]:
        """Nobody of these has any weight inside the `with` block; what gates give them stays theirs."""
        before = context.activation
        kept = (styles if left == "subjects" else ~styles).float()
        scales = kept if before.scales is None else before.scales * kept.to(before.scales)
        self.left = left
        try:
            with context.aside():
                context.activation = replace(before, scales=scales)
                yield
        finally:
            self.left, context.activation = None, before


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
