"""Gates without training: words go to their experts by the prompt, image tokens by attention to those words.

Each expert has the tokens of its phrases to itself, in the text encoders and in the keys and values of
cross-attention; the text encoders' other tokens are shared by all. While the picture's layout forms, the
denoiser's own cross-attention tells which image tokens look at whose words; from then on they belong to that
expert. Experts of the whole picture (styles) have every token, beside the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .rules import number
from .words import TokenPhrases

# Texts that are kept.
_KEPT = 256

_ALLOWED = {
    "sharpness": number(0, math.inf, above=True),
    "strength": number(0, math.inf, above=True),
    "until": number(0, 1),
    "floor": number(0, 1),
}


@dataclass(frozen=True, kw_only=True)
class AutoSettings:
    """How image tokens are shared out.

    Args:
        sharpness: factor of each expert's attention map, which is 1 where it is highest, in the softmax over
            the experts.
        strength: of an expert inside its place.
        until: the timestep, from 1 (noise) to 0, down to which the denoiser is watched; at least one forward.
        floor: attention, of the highest, below which an image token belongs to nobody; it rises to full
            strength at twice that.

    Raises:
        ConfigError: a value is out of range.
    """

    sharpness: float = 8.0
    strength: float = 1.5
    until: float = 0.9
    floor: float = 0.25

    def __post_init__(self) -> None:
        for name, rule in _ALLOWED.items():
            rule.check(name, getattr(self, name))


@dataclass(eq=False)
class KnownText:
    """A text as a denoiser reads it, and whose words its tokens are.

    Attributes:
        encoded: (L, d).
        places: (L, N), see `places_of`.
    """

    encoded: Tensor
    places: Tensor


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
    """

    phrases: Mapping[str, TokenPhrases]
    everywhere: Mapping[str, float] = field(default_factory=dict)
    settings: AutoSettings = field(default_factory=AutoSettings)
    texts: list[KnownText] = field(default_factory=list)
    ids: dict[str, Tensor] = field(default_factory=dict)

    def meet(self, named: frozenset[str]) -> None:
        """A network begins to read texts that name these experts; hosts that know no more decide here."""

    def remember(self, encoded: Tensor, places: Tensor) -> None:
        """Note what denoisers will read for some texts.

        Args:
            encoded: (B, L, d).
            places: (B, L, N), see `places_of`.
        """
        self.texts += [KnownText(one.detach(), own) for one, own in zip(encoded, places, strict=True)]
        del self.texts[:-_KEPT]
