"""`mixture="auto"`: which experts count in the tokens of texts; places are in `picture_shares`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import functional
from .auto import Auto, AutoSettings
from .context import ForwardContext
from .errors import ConfigError
from .networks.base import EMBEDDING, Forward
from .values import GateValue
from .words import places_of

# Attention, of the highest, from which on a place is held to be an expert's; entirely at twice that.
_CLAIMED = 0.3


@dataclass(frozen=True, eq=False)
class Counting:
    """The experts of a mixture, in the order of the rows, and which of them count."""

    auto: Auto
    names: tuple[str, ...]
    active: tuple[int, ...]

    def counting(self, device: torch.device) -> Tensor:
        """(N,) 1 for experts that count."""
        return functional.active_mask(self.active, len(self.names), device).float()

    def everywhere(self, device: torch.device) -> Tensor:
        """(N,) weight of experts in the whole picture, 0 for those that have places of their own."""
        weights = torch.tensor([self.auto.everywhere.get(name, 0.0) for name in self.names], device=device)
        return weights * self.counting(device)

    def everywhere_of(self, named: Tensor, device: torch.device) -> Tensor:
        """(B, 1, N) the same in the rows of a batch, from whom their texts name: (B, N), on the CPU."""
        weights = self.everywhere(device)[None, None]
        called = self.auto.by_row
        if called is None:
            return weights
        always = torch.tensor([name not in called for name in self.names])
        return weights * (named | always)[:, None].to(device)

    def called_only(self) -> bool:
        """Whether an expert counts in the whole of a picture only where its text says so."""
        return set(self.auto.everywhere) <= (self.auto.by_row or frozenset())

    def in_words(self, places: Tensor) -> Tensor:
        """Weights (B, L, N) of the experts in their own words, from whose words tokens are."""
        apart = self.everywhere(places.device) == 0
        several = (places.any(1) & apart).sum(-1) > 1
        return torch.where(several[:, None, None], places * self.auto.settings.words, places)

    def meet(self, places: Tensor) -> None:
        """Tell the host whom texts name, from places (B, L, N)."""
        named = places.flatten(0, 1).any(0).tolist()
        names = (name for index, name in enumerate(self.names) if named[index] and index in self.active)
        self.auto.meet(frozenset(names))


def with_everywhere(weights: Tensor, everywhere: Tensor) -> Tensor:
    """Weights (..., N) with those (N,) of experts that count everywhere."""
    return torch.where(everywhere != 0, everywhere.expand_as(weights), weights)


class TextShares:
    """Weights of the tokens of a text encoder: 1 for whose words they are.

    Args:
        auto: what the host knows.
        part: which text encoder.
        names: of the experts, in the order of the rows.
        active: indices of those that count.
    """

    def __init__(self, auto: Auto, part: str, names: tuple[str, ...], active: tuple[int, ...]) -> None:
        phrases = auto.phrases.get(part, {})
        self._phrases = {name: phrases.get(name, ()) for name in names}
        self._rows = Counting(auto, names, active)
        self.by_place = auto.shared is not None
        self._weights = self._everywhere = torch.zeros(0)
        self._values: dict[str, GateValue] = {}
        self._named: Tensor | None = None

    def begin(self, context: ForwardContext, forward: Forward) -> None:
        """A forward begins: look for the phrases among its tokens.

        Raises:
            ConfigError: there are no tokens.
        """
        ids = forward.ids if forward.ids is not None else self._rows.auto.ids.get(context.part)
        if ids is None:
            raise ConfigError(
                f"mixture='auto' reads the tokens of a text, and the {context.part} was run without them "
                "(with embeddings instead)."
            )
        places = places_of(ids, self._phrases)
        self._rows.meet(places)
        named = self._named_by(places)
        everywhere = self._rows.everywhere_of(named, ids.device)
        own = places.to(ids.device) * self._rows.counting(ids.device)
        self._weights = shared_rest(self._rows.in_words(own))
        if self._rows.auto.by_row is not None and self._rows.called_only() and not bool(places.any()):
            # Negative prompts of those that name one expert alone: it has everything, `Calling.everywhere`.
            alone = named * (named.sum(1, keepdim=True) == 1)
            self._weights = self._weights + alone[:, None].to(own) * self._rows.counting(ids.device)
        taken = (own * (everywhere == 0)).any(-1, keepdim=True)
        self._everywhere = torch.where(taken, everywhere * self._rows.auto.settings.style_text, everywhere)
        self._values.clear()

    def value(self, context: ForwardContext, stream: str, tokens: int, place: str) -> GateValue:
        """Weights (B * L, N); one row per text where `stream` is "embedding"."""
        refining = self._rows.auto.refining
        if place not in self._values:
            weights = self._weights
            if refining is not None:
                weights = refining.refine(context.part, place, weights, 0.0)
            weights = with_everywhere(weights, self._everywhere)
            self._values[place] = GateValue(weights.flatten(0, 1), len(weights), None, in_backward=False)
        value = self._values[place]
        return value.pooled() if stream == EMBEDDING else value

    def _named_by(self, places: Tensor) -> Tensor:
        """(B, N) whom the texts of a text encoder name, from places (B, L, N); on the CPU.

        Negative prompts, which name nobody, go with the prompts that were read before them.
        """
        named = places.any(1).cpu()
        if bool(named.any()):
            self._named = named
        elif (before := self._named) is not None:
            named = before if len(before) == len(named) else before.any(0, keepdim=True).expand_as(named)
        return named

    def remove(self) -> None:
        """Nothing to take away."""


def shared_rest(weights: Tensor) -> Tensor:
    """Give tokens of no phrase to all experts that the text names, in equal parts.

    The end of a text is among them, in which the whole of it is summed up: with no expert there, some
    subjects stay the base's own.

    Args:
        weights: (B, L, N) of the tokens of texts.
    Returns:
        (B, L, N).
    """
    named = (weights > 0).any(1, keepdim=True).to(weights)
    free = (weights == 0).all(-1, keepdim=True)
    return weights + free * named / named.sum(-1, keepdim=True).clamp_min(1)


def claimed_places(maps: Tensor) -> Tensor:
    """How far each place of a picture is some expert's, for styles: (B, 1, H, W) from maps (B, N, H, W).

    Surer than the places of `shared_places`, which cover most of a picture.
    """
    return _held(maps / maps.amax((-1, -2), keepdim=True).clamp_min(functional.EPS), _CLAIMED)


def shared_places(
    maps: Tensor, settings: AutoSettings, timestep: float, inside: float | None = None
) -> Tensor:
    """Weights of the experts in each place of a picture, from how much it looks at their words.

    Args:
        maps: (B, N, H, W) attention, 0 for experts that the text does not name.
        settings: how places are shared out.
        timestep: from 1 (noise) to 0.
        inside: how far each place belongs to any expert; None to tell it by the attention.
    Returns:
        (B, N, H, W). A single expert has the whole picture, at 1.
    """
    peak = maps.amax((-1, -2), keepdim=True)
    named = peak > 0
    seen = maps / peak.clamp_min(functional.EPS)
    logits = (settings.sharpness * seen).masked_fill(~named, float("-inf"))
    shares = torch.nan_to_num(torch.softmax(logits, dim=1))
    if inside is None:
        held = _held(seen, settings.floor)
    else:
        held = torch.full_like(seen[:, :1], inside)
    several = named.sum(1, keepdim=True) > 1
    return torch.where(several, shares * held * settings.strength_at(timestep), shares)


def _held(seen: Tensor, floor: float) -> Tensor:
    """(B, 1, H, W) how far places are anybody's, from attention (B, N, H, W) of 1 where it is highest."""
    rise = max(floor, functional.EPS)
    return ((seen.amax(1, keepdim=True) - floor) / rise).clamp(0.0, 1.0)
