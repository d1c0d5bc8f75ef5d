"""Gates without training: words go to their experts by the prompt, image tokens by attention to those words.

Each expert has the tokens of its phrases to itself, in the text encoders and in the keys and values of
cross-attention; the text encoders' other tokens are shared by all. While the picture's layout forms, the
denoiser's own cross-attention tells which image tokens look at whose words; from then on they belong to that
expert. Experts of the whole picture (styles) have every token, beside the others.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .networks.base import Texts
from .rules import number
from .torch_state import on_device
from .words import TokenPhrases

# Texts that are kept.
_KEPT = 256
# A denoiser's text is a known one up to rounding.
_SAME = 1e-2

# Between these timesteps strength eases off: behind the first shapes stand, behind the second details come.
_SHAPES, _DETAILS = 0.7, 0.3
# Between these a style comes to count as if it were alone.
_STYLED, _STYLED_DETAILS = 0.5, 0.15

# See `AutoSettings.balance`.
_BALANCE, _JOINT_BALANCE = 1.2, 2.0

_ALLOWED = {
    "words": number(0, math.inf, above=True),
    "sharpness": number(0, math.inf, above=True),
    "strength": number(0, math.inf, above=True),
    "detail": number(0, math.inf, above=True),
    "until": number(0, 1),
    "floor": number(0, 1),
    "style": number(0, math.inf),
    "style_inside": number(0, math.inf),
    "style_words": number(0, math.inf),
    "style_text": number(0, math.inf),
    "balance": number(0, math.inf),
}


@dataclass(frozen=True, kw_only=True)
class AutoSettings:
    """How tokens are shared out.

    Args:
        words: of an expert in its own words, where a text names several: in full each disturbs the words of
            the others, which it never met in its training, and their subjects go.
        sharpness: factor of each expert's attention map, which is 1 where it is highest, in the softmax over
            the experts.
        strength: of an expert inside its place while shapes form: more than 1, or some never come.
        detail: the same for details, which more than 1 washes out.
        until: the timestep, from 1 (noise) to 0, down to which the denoiser is watched; at least one forward.
        floor: attention, of the highest, below which an image token belongs to nobody; it rises to full
            strength at twice that.
        style: where a prompt names an expert of the whole picture and others: its strength until details
            come, for which it is 1.
        style_inside: what it counts in the places of others, as a share of that, until details come.
        style_words: its weight in the words there, in keys and values of cross-attention.
        style_text: its weight in the words of others, in text encoders.
        balance: by how much another expert is to change the prediction in its places, of what the style
            changes there: the one that falls behind is led on, see `balancing`; 0 leaves them alone. None is
            what was found best, see `balance_in`.

    Raises:
        ConfigError: a value is out of range.
    """

    words: float = 0.75
    sharpness: float = 16.0
    strength: float = 2.0
    detail: float = 1.0
    until: float = 0.9
    floor: float = 0.1
    style: float = 1.3
    style_inside: float = 0.5
    style_words: float = 0.4
    style_text: float = 0.5
    balance: float | None = None

    def __post_init__(self) -> None:
        for name, rule in _ALLOWED.items():
            value = getattr(self, name)
            if value is not None or name != "balance":
                rule.demand(name, value)

    def balance_in(self, *, joint: bool) -> float:
        """`balance`, in a network that has text and image in one sequence or in another one."""
        usual = _JOINT_BALANCE if joint else _BALANCE
        return usual if self.balance is None else self.balance

    def strength_at(self, timestep: float) -> float:
        """Of an expert inside its place at a timestep, from 1 (noise) to 0."""
        return self.detail + _rise(timestep, _DETAILS, _SHAPES) * (self.strength - self.detail)

    def style_at(self, timestep: float) -> float:
        """Of an expert of the whole picture beside others, likewise."""
        return 1.0 + _rise(timestep, _STYLED_DETAILS, _STYLED) * (self.style - 1.0)

    def style_inside_at(self, timestep: float) -> float:
        """Its share of that in the places of others, likewise."""
        return 1.0 + _rise(timestep, _STYLED_DETAILS, _STYLED) * (self.style_inside - 1.0)


def _rise(timestep: float, low: float, high: float) -> float:
    """From 0 at one timestep, and below, to 1 at another."""
    return min(max((timestep - low) / (high - low), 0.0), 1.0)


class Refining(Protocol):
    """Refines the weights of experts, gate by gate; see `shared_gates.SharedGates`."""

    def rest(self, beside: tuple[str, ...]) -> None:
        """Told that these experts, which count in a whole picture, keep it from refining that one."""

    def refine(self, part: str, place: str, weights: Tensor, timestep: float) -> Tensor:
        """(B, T, N) from (B, T, N) of the experts that have places of their own."""


@dataclass(eq=False)
class KnownText:
    """A text as a denoiser reads it, and whose words its tokens are.

    Attributes:
        encoded: (L, d).
        places: (L, N), see `places_of`.
        prompt: whether it is a prompt, or a negative one, which has the places of its prompt; None where
            nobody knows: then it is a prompt if it names an expert.
    """

    encoded: Tensor
    places: Tensor
    prompt: bool | None = None


@dataclass(eq=False)
class Auto:
    """What the prompts of a call say of the experts; made by the host, filled while it encodes texts.

    Args:
        phrases: part of a text encoder -> the experts' phrases in its tokens.
        everywhere: weight of the experts that count in the whole picture; the others count where the prompt
            names them.
        settings: how image tokens are shared out.

    Attributes:
        texts: what the host's text encoders made of texts lately.
        ids: part -> (B, L) tokens that its text encoder is about to read, where a host gives it embeddings.
        single: whether a host knows that one picture is drawn at a time, by however many texts.
        continues: whether a host knows that the next steps go on with the picture that was drawn last, in
            another size or from more noise: what was seen of it holds.
        by_row: where a host knows that each row of a text encoder is a text of its own, and they do not name
            the same experts: those that count in the whole of the pictures whose texts name them; else None.
        rows_apart: whether a host's denoiser may be run for some rows of a batch alone.
        shared: what refines the weights, trained once for the base; None for nothing.
        unrefined: the experts of the whole picture for which it refines nothing, see `count_everywhere`.
    """

    phrases: Mapping[str, TokenPhrases]
    everywhere: Mapping[str, float] = field(default_factory=dict)
    settings: AutoSettings = field(default_factory=AutoSettings)
    texts: list[KnownText] = field(default_factory=list)
    ids: dict[str, Tensor] = field(default_factory=dict)
    single: bool = False
    continues: bool = False
    by_row: frozenset[str] | None = None
    rows_apart: bool = False
    shared: Refining | None = None
    unrefined: tuple[str, ...] = field(default=(), init=False)
    _recognised: tuple[Texts, list[KnownText | None]] | None = field(default=None, init=False, repr=False)

    @property
    def refining(self) -> Refining | None:
        """What refines the weights of this picture: nothing where an expert counts in the whole of it.

        Shared gates were trained on subjects among themselves, and beside a style they weigh them too little.
        """
        return None if self.everywhere else self.shared

    def count_everywhere(self, weights: Mapping[str, float], named: Collection[str]) -> None:
        """Note who counts in the whole of the pictures whose texts name these experts.

        Where shared gates would refine several of them and do not for that, they are told.
        """
        self.everywhere = weights
        several = sum(name not in weights for name in named) > 1
        self.unrefined = tuple(weights) if self.shared is not None and several else ()
        if self.shared is not None and self.unrefined:
            self.shared.rest(self.unrefined)

    def meet(self, named: frozenset[str]) -> None:
        """A network begins to read texts that name these experts; hosts that know no more decide here."""

    def remember(self, encoded: Texts, places: Texts, prompts: Sequence[bool | None] | None = None) -> None:
        """Note what denoisers will read for some texts.

        Args:
            encoded: (B, L, ...), or (L, d) for each.
            places: (B, L, N), or (L, N) for each, see `places_of`.
            prompts: which of them are prompts, see `KnownText`.
        """
        kinds = prompts or [None] * len(encoded)
        rows = zip(encoded, places, kinds, strict=True)
        self.texts += [KnownText(one.detach().flatten(1), own, kind) for one, own, kind in rows]
        del self.texts[:-_KEPT]

    def recognise(self, text: Texts) -> list[KnownText | None]:
        """Whose words the texts are made of that a denoiser is given.

        Args:
            text: (B, L, ...), or (L, d) for each.
        Returns:
            For each of them what is known of it; None for one that nobody remembers.
        """
        if self._recognised is None or not are_same(self._recognised[0], text):
            self._recognised = text, [self._placed(row.flatten(1)) for row in text]
        return self._recognised[1]

    def _placed(self, row: Tensor) -> KnownText | None:
        """What is known of a text (L, d) that a host may have lengthened to stand beside a longer one.

        Some repeat it, some put an empty text or its last token behind it, or zeros before it; some cut it.
        """
        found: list[Tensor] = []
        first: KnownText | None = None
        start = begin = _zeros_before(row)
        while start < len(row):
            known = self._known(row[start:], cut=start == begin)
            if known is None:
                break
            first = first or known
            found.append(known.places[: len(row) - start])
            start += len(found[-1])
        if first is None:
            # Hosts put zeros in place of a negative prompt.
            empty = bool(self.texts) and begin == len(row)
            return KnownText(row, _nothing(row, self.texts[-1]), prompt=False) if empty else None
        before, behind = (_nothing(part, first) for part in (row[:begin], row[start:]))
        return KnownText(row, torch.cat([before, *found, behind]), first.prompt)

    def _known(self, row: Tensor, *, cut: bool) -> KnownText | None:
        """What stands at the beginning of a text (L, d): the longest that is known, whole, and the nearest.

        Args:
            row: the text.
            cut: whether it may be the beginning of a longer one.
        """
        best: KnownText | None = None
        rank = (0, False, 0.0)
        for known in reversed(self.texts):
            length = min(len(known.encoded), len(row))
            whole = length == len(known.encoded)
            if known.encoded.shape[1] != row.shape[1] or not (whole or cut) or length < rank[0]:
                continue
            # In the numbers that the host made of it, so that most are the same to the bit.
            own = on_device(known.encoded[:length], row.device).to(row.dtype).float()
            gap, norm = torch.stack([(own - row[:length].float()).norm(), own.norm()]).tolist()
            if gap <= _SAME * norm and (length, whole, -gap) > rank:
                best, rank = known, (length, whole, -gap)
            if best is known and gap == 0 and whole and length == len(row):
                break
        if best is not None:  # the next step is most likely to ask for it again
            self.texts.remove(best)
            self.texts.append(best)
        return best


def are_same(texts: Texts, others: Texts) -> bool:
    """Whether a host gives the very same texts again, as in the steps of one picture."""
    if isinstance(texts, Tensor) or isinstance(others, Tensor):
        return texts is others
    return len(texts) == len(others) and all(one is other for one, other in zip(texts, others, strict=True))


def _zeros_before(row: Tensor) -> int:
    """How many tokens of a text (L, d) are nothing but zeros until the first that is not."""
    written = row.any(1)
    return int(written.int().argmax()) if bool(written.any()) else len(row)


def _nothing(row: Tensor, like: KnownText) -> Tensor:
    """(L, N) of a text (L, d) of which no token is anybody's."""
    return like.places.new_zeros(len(row), like.places.shape[1])
