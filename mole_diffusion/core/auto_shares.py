"""`mixture="auto"`: the weights of tokens in the forwards of text encoders and denoisers; see `auto`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from .attention import AttentionMaps
from .auto import Auto, AutoSettings
from .context import ForwardContext
from .errors import ConfigError
from .networks.base import CONTEXT, DENOISER, EMBEDDING, TOKENS, Forward, NetworkMap
from .regions import RegionMasks
from .torch_state import is_compiling, on_device
from .values import GateValue
from .words import places_of

# A row of a denoiser's text is a known one up to rounding.
_SAME = 1e-2
# Samplers go back by less than this within a picture.
_ANEW = 0.1


@dataclass(frozen=True, eq=False)
class _Rows:
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

    def meet(self, places: Tensor) -> None:
        """Tell the host whom texts name, from places (B, L, N)."""
        named = places.flatten(0, 1).any(0).tolist()
        names = (name for index, name in enumerate(self.names) if named[index] and index in self.active)
        self.auto.meet(frozenset(names))


def _with_everywhere(weights: Tensor, everywhere: Tensor) -> Tensor:
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
        self._rows = _Rows(auto, names, active)
        self._value: GateValue | None = None

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
        weights = places.to(ids.device)
        counting, everywhere = self._rows.counting(ids.device), self._rows.everywhere(ids.device)
        weights = _with_everywhere(shared_rest(weights * counting), everywhere)
        self._value = GateValue(weights.flatten(0, 1), len(weights), None, in_backward=False)

    def value(self, context: ForwardContext, stream: str, tokens: int) -> GateValue:
        """Weights (B * L, N); one row per text where `stream` is "embedding"."""
        assert self._value is not None
        return self._value.pooled() if stream == EMBEDDING else self._value

    def remove(self) -> None:
        """Nothing to take away."""


class PictureShares:
    """Weights of a denoiser's tokens, in the forwards of one picture or batch.

    Args:
        auto: what the host knows.
        maps: watches the denoiser.
        names: of the experts, in the order of the rows.
        active: indices of those that count.
        regions: where experts count; None for everywhere.
    """

    def __init__(
        self,
        auto: Auto,
        maps: AttentionMaps,
        names: tuple[str, ...],
        active: tuple[int, ...],
        regions: RegionMasks | None,
    ) -> None:
        self._auto, self._maps, self._regions = auto, maps, regions
        self._rows = _Rows(auto, names, active)
        self._known: tuple[Tensor, Tensor] | None = None
        self._values: dict[tuple[str, int], GateValue] = {}
        self._words = self._everywhere = torch.zeros(0)
        self._sum: Tensor | None = None
        self._own: Tensor | None = None
        self._order: Tensor | None = None
        self._forwards = 0
        self._start = self._last = 0.0

    def remove(self) -> None:
        """Stop watching."""
        self._maps.remove()

    def begin(self, context: ForwardContext, forward: Forward) -> None:
        """A forward begins: take what the last one was seen to look at; find out whose the words are.

        Raises:
            ConfigError: the denoiser is given no text, or one that nobody knows.
            RegionMaskError: a mask is not of the latent's proportions.
        """
        if self._regions is not None and forward.size is not None:
            self._regions.check_aspect(forward.size)
        self._take()
        time = 1.0 if forward.timestep is None else float(torch.as_tensor(forward.timestep).max())
        if time > self._last + _ANEW or time >= self._start > self._last:
            self._sum, self._forwards = None, 0  # another picture
        if not self._forwards:
            self._start = time
        self._last = time
        if forward.text is None:
            raise ConfigError(f"mixture='auto' needs the {context.part} to be called with a text.")
        self._words = self._places(forward.text)
        self._everywhere = self._rows.everywhere(self._words.device)
        watched = self._sum is None or time > self._auto.settings.until
        reading = self._regions is None and watched and bool(self._words.any())
        self._maps.begin(self._words if reading else None, context.token_grid)
        self._lay_out(reading=reading)
        self._forwards += 1
        self._values.clear()

    @property
    def _named(self) -> Tensor:
        """(B,) whether the text names an expert; a negative prompt does not."""
        return self._words.flatten(1).any(1)

    def _take(self) -> None:
        """Add the maps of the last forward, of the rows whose text names experts."""
        found = self._maps.taken()
        if found is None:
            return
        found = found[self._named]
        self._sum = found if self._sum is None or self._sum.shape != found.shape else self._sum + found

    def _places(self, text: Tensor) -> Tensor:
        """(B, L, N) whose words the tokens of the texts are."""
        if self._known is not None and self._known[0] is text:
            return self._known[1]
        rows = [self._place(one) for one in text]
        if all(one is None for one in rows):
            raise ConfigError(
                "mixture='auto' reads the words of the prompt, and the denoiser was given a text that this "
                "pipeline did not encode: draw with a prompt, or with what its encode_prompt returns inside "
                "composing(mixture='auto')."
            )
        nothing = torch.zeros(text.shape[1], len(self._rows.names))
        places = torch.stack([nothing if one is None else one for one in rows])
        self._rows.meet(places)
        places = places.to(text.device)
        places = places * self._rows.counting(text.device) * (self._rows.everywhere(text.device) == 0)
        self._known = text, places
        return places

    def _place(self, row: Tensor) -> Tensor | None:
        """(L, N) of the known text that a row (L, d) is; None for none."""
        for known in reversed(self._auto.texts):
            length, width = known.encoded.shape
            # Hosts repeat a text that stands beside a longer one in a batch.
            if width != row.shape[1] or len(row) % length:
                continue
            own = on_device(known.encoded, row.device).float()
            if float((own - row[:length].float()).norm()) <= _SAME * float(own.norm()):
                return known.places.repeat(len(row) // length, 1)
        return None

    def value(self, context: ForwardContext, stream: str, tokens: int) -> GateValue:
        """Weights (B * T, N) of the tokens of a stream; one row per picture where it is "embedding"."""
        if is_compiling():  # a block that finds what an earlier one computed would not be like that one
            return self._value(context, stream, tokens)
        key = stream, tokens
        if key not in self._values:
            self._values[key] = self._value(context, stream, tokens)
        return self._values[key]

    def _value(self, context: ForwardContext, stream: str, tokens: int) -> GateValue:
        if stream == CONTEXT:
            weights = self._words
        elif stream == EMBEDDING:
            size = self._own.shape[-2:] if self._own is not None and self._regions is None else (1, 1)
            weights = self._picture(int(size[0]), int(size[1])).mean(1, keepdim=True)
        else:
            weights = self._picture(*context.token_grid(tokens))
        weights = _with_everywhere(weights, self._everywhere)
        if stream == TOKENS and self._regions is not None:
            weights = weights * self._regions.on_grid(*context.token_grid(tokens), weights.device)
        return GateValue(weights.flatten(0, 1), len(weights), None, in_backward=False)

    def _lay_out(self, *, reading: bool) -> None:
        """Share out the places, once per forward: what depends on a layer's size is left to `_picture`."""
        self._own = self._order = None
        named = self._named
        if self._regions is not None:
            seen = self._words.amax(1)[named][..., None, None]
            own = shared_places(seen, self._auto.settings, inside=1.0)
        elif self._sum is None or reading:
            # The layout forms, and it forms as the experts have it: without them some subjects never come.
            own = self._words.amax(1)[named][..., None, None]
        else:
            own = shared_places(self._sum, self._auto.settings)
        if not len(own):
            return
        order = _order(named.tolist(), len(own))
        if len(own) in order:
            own = torch.cat([own, own.mean(0, keepdim=True)])
        self._own = own
        self._order = torch.tensor(order, device=own.device)

    def _picture(self, height: int, width: int) -> Tensor:
        """(B, H * W, N) weights of the experts that the texts name; all in full while they are looked for."""
        if self._own is None or self._order is None:
            return self._words.new_zeros(len(self._words), height * width, self._words.shape[-1])
        own = F.interpolate(self._own, size=(height, width), mode="bilinear", align_corners=False)
        own = own.flatten(2).transpose(1, 2)
        if self._regions is not None:
            masks = self._regions.on_grid(height, width, own.device)
            own = functional.region_weights(own, masks) * own.sum(-1, keepdim=True)
        return own.index_select(0, self._order)


def shares_of(
    auto: Auto,
    network: nn.Module,
    layout: NetworkMap,
    names: tuple[str, ...],
    active: tuple[int, ...],
    regions: RegionMasks | None,
) -> TextShares | PictureShares:
    """Weights of a network's tokens by the prompt.

    Args:
        auto: what the host knows.
        network: a denoiser or a text encoder.
        layout: what it is.
        names: of the experts, in the order of the rows.
        active: indices of those that count.
        regions: where experts count; None for everywhere.

    Raises:
        ConfigError: it is a denoiser that reads its texts otherwise than by cross-attention.
    """
    if layout.architecture.role != DENOISER:
        return TextShares(auto, layout.part, names, active)
    layers = layout.architecture.text_readers(layout.sites)
    if not layers:
        raise ConfigError(
            f"Cross-attention tells which place is whose, and {layout.architecture.name} networks have "
            "none: train gates, or use mixture='nla'."
        )
    return PictureShares(auto, AttentionMaps(network, layers), names, active, regions)


def _order(named: Sequence[bool], count: int) -> list[int]:
    """Which weights each row of a batch has, of those of `count` texts; `count` itself for their mean.

    Args:
        named: whether the text of a row names an expert; a negative prompt does not.
        count: of the texts that do, perhaps in another forward.
    """
    batch = len(named)
    if sum(named) != count:  # the prompt and its negative in turns
        return list(range(count)) if count == batch else [0 if count == 1 else count] * batch
    theirs, others = iter(range(count)), iter(range(count))
    return [next(theirs) if own else next(others) if batch == 2 * count else count for own in named]


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


def shared_places(maps: Tensor, settings: AutoSettings, inside: float | None = None) -> Tensor:
    """Weights of the experts in each place of a picture, from how much it looks at their words.

    Args:
        maps: (B, N, H, W) attention, 0 for experts that the text does not name.
        settings: how places are shared out.
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
        rise = max(settings.floor, functional.EPS)
        held = ((seen.amax(1, keepdim=True) - settings.floor) / rise).clamp(0.0, 1.0)
    else:
        held = torch.full_like(seen[:, :1], inside)
    several = named.sum(1, keepdim=True) > 1
    return torch.where(several, shares * held * settings.strength, shares)
