"""Trained gates where experts of the whole picture (styles) count beside others: see `balancing`.

Gates that were trained on both give one of them too little in some pictures, as LoRAs that never met do.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .auto import Auto, KnownText
from .balancing import Balance, Lead, Wanted
from .context import ForwardContext
from .groups import Group
from .laid_out import lengthened, on_grid
from .maps import mean_map
from .networks.base import Architecture, Forward, Texts
from .rules import number

#: By how much a subject is to change its places, of what styles change there: trained gates lose styles
#: sooner than subjects.
GATED_BALANCE = 0.75
_STYLE = 2.25


@dataclass(frozen=True, eq=False)
class Styled:
    """What is to be kept in balance.

    Attributes:
        styles: names of the experts that change the whole picture.
        balance: in place of `GATED_BALANCE`; 0 leaves gates alone. None leaves them alone in networks that
            have text and image in one sequence, where nobody has looked at styles yet.
        texts: what knows which texts are prompts; None, or a text that it does not know, for all.

    Raises:
        ConfigError: the balance is no number from 0 on.
    """

    styles: Collection[str]
    balance: float | None = None
    texts: Auto | None = None

    def __post_init__(self) -> None:
        number(0, math.inf).check("balance", self.balance)


class GateBalance:
    """Keeps styles and subjects that gates mix in balance, in the forwards of a denoiser.

    Args:
        styled: what is to be done.
        architecture: what the denoiser is.
        joint: whether it has text and image in one sequence.
        groups: its gates.
        names: of the experts, in the order of the rows.
        active: indices of those that count.
    """

    def __init__(
        self,
        styled: Styled,
        architecture: Architecture,
        joint: bool,
        groups: Sequence[Group],
        names: tuple[str, ...],
        active: tuple[int, ...],
    ) -> None:
        self._texts, self._groups = styled.texts, groups
        apart = styled.texts is not None and styled.texts.rows_apart
        self._balance = Balance(architecture, rows_apart=apart)
        usual = 0.0 if joint else GATED_BALANCE
        self._lead = Lead(usual if styled.balance is None else styled.balance, style=_STYLE)
        counting = [index in active for index in range(len(names))]
        self._styles = torch.tensor([name in styled.styles for name in names])
        self._subjects = torch.tensor(counting) & ~self._styles
        self._beside = bool(self._subjects.any()) and bool((torch.tensor(counting) & self._styles).any())

    def begin(self, context: ForwardContext, forward: Forward) -> None:
        """A forward begins; in training it is left alone."""
        if not self._beside or torch.is_grad_enabled() or forward.timestep is None or forward.size is None:
            return
        prompts = self._prompts(forward.text)
        if prompts is None:
            return
        time = float(torch.as_tensor(forward.timestep).max())
        places = partial(self._places, context)
        wanted = Wanted(prompts, torch.ones_like(prompts), self._styles, places, time, self._lead)
        self._balance.begin(context, wanted)

    def _prompts(self, text: Texts | None) -> Tensor | None:
        """(B,) which rows are prompts, as far as anybody knows."""
        if text is None:
            return None
        known = [None] * len(text) if self._texts is None else self._texts.recognise(text)
        return torch.tensor([one is None or _is_prompt(one) for one in known])

    def _places(self, context: ForwardContext, prediction: Tensor) -> Tensor:
        """(B, T, N) whose the places of a prediction are, by what the gates say."""
        found = mean_map(context, self._groups)
        own = torch.zeros(1) if found is None else found
        own = own * self._subjects.to(own.device)[:, None, None]
        if prediction.dim() > 3:
            return on_grid(own, prediction.shape[-2], prediction.shape[-1])
        tokens = prediction.shape[1]
        return lengthened(on_grid(own, *context.token_grid(tokens - context.references(tokens))), tokens)


def _is_prompt(text: KnownText) -> bool:
    return bool(text.places.any()) if text.prompt is None else text.prompt
