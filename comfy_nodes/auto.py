"""Gates without training in ComfyUI: whose words a CLIP encodes, and what of them a MODEL reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from mole_diffusion.core.auto import Auto
from mole_diffusion.core.calling import Calling
from mole_diffusion.core.experts import Expert
from mole_diffusion.core.mixture import Mixture
from mole_diffusion.core.words import TokenPhrases, places_of, word_places

from .binding import adapts_text
from .texts import encoder_of, tokenizer_of

#: No token has this number: an embedding stands in its place.
_NO_TOKEN = -1


class ClipReader(Auto):
    """What the texts that a CLIP encodes say of the experts.

    ComfyUI gives its text encoders embeddings, and samplers texts that any node may have made. So it watches
    the CLIP while its experts are on it: the tokens of each encoder before it runs, and what comes out of all
    of them together, by which a denoiser's text is known again. Each text is read by itself: a style counts
    in the texts that name it and in the pictures of these.

    A transformer's text is what a language model says of it, alone or behind a CLIP's.

    Args:
        clip: ComfyUI's CLIP.
        experts: those that count.
        encoders: part -> ComfyUI's name of the text encoder.
        order: names of all experts of the mixture, as its rows have them.
        calling: how prompts call them.
    """

    def __init__(
        self,
        clip: Any,
        experts: Iterable[Expert],
        encoders: Mapping[str, str],
        order: Sequence[str],
        calling: Calling | None = None,
    ) -> None:
        self._experts = {expert.name: expert for expert in experts}
        self._order = tuple(order)
        self._calling = calling or Calling()
        self._encoders = encoders
        self._tokenizers = clip.tokenizer
        self._language: list[str] = []
        # The empty text is what a chat is around any.
        self._blank: Mapping[str, Any] = clip.tokenizer.tokenize_with_weights("")
        self._handles: list[RemovableHandle] = []
        super().__init__({part: self._phrases(clip, name) for part, name in encoders.items()})

    def _phrases(self, clip: Any, name: str) -> TokenPhrases:
        """The experts' phrases in the tokens of one encoder."""
        tokenizer = getattr(clip.tokenizer, name).tokenizer
        return {
            expert: [
                tokenizer(phrase, add_special_tokens=False)["input_ids"] for phrase in self._calling.of(one)
            ]
            for expert, one in self._experts.items()
        }

    def meet(self, named: frozenset[str]) -> None:
        """See `Auto`: a text that names nobody, such as a negative prompt, leaves things as they are."""
        if named:
            self.count_everywhere(self._calling.everywhere(named, self._experts), named)

    def begin(self, tokens: Iterable[Mapping[str, Any]]) -> None:
        """Texts are about to be encoded at once: each by itself, where none has more than one section."""
        whole = all(len(sections) == 1 for own in tokens for sections in own.values())
        self.by_row = frozenset(self._experts) if whole else None

    def attach(self, clip_model: nn.Module) -> None:
        """Watch what ComfyUI's text encoders read; its object of all of them together."""
        self.detach(clip_model)
        for part, name in self._encoders.items():
            encoder = getattr(clip_model, name)
            self._handles.append(encoder.register_forward_pre_hook(self._before(part)))
        clips = {name.removeprefix("clip_") for name in self._encoders.values()}
        self._language = [
            key
            for key in self._blank
            if key not in clips and isinstance(encoder_of(clip_model, key), nn.Module)
        ]

    def detach(self, clip_model: nn.Module) -> None:
        """Stop that; doing it twice does no harm."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before(self, part: str) -> Any:
        def before(encoder: nn.Module, args: tuple[Any, ...]) -> None:
            self.ids[part] = _numbers(args[0])

        return before

    def note(self, tokens: Mapping[str, Any], encoded: torch.Tensor) -> Mapping[str, Any]:
        """Note whose words the text is made of, whose sections come one after the other."""
        with torch.inference_mode(False):
            places = self._places(tokens, encoded.shape[1])
            if places is not None:
                self.remember(encoded.clone(), places[None])
        return {}

    def _places(self, tokens: Mapping[str, Any], rows: int) -> torch.Tensor | None:
        """(L, N) whose words an encoded text is made of, which has so many rows; None where nobody knows."""
        clips, language = self._of_clips(tokens), self._of_language(tokens)
        if language is None:
            return clips if clips is not None and len(clips) == rows else None
        if clips is not None and rows == len(clips) + len(language):
            return torch.cat([clips, language])
        # Models leave out the beginning of a chat, and pictures in it are more than one row each.
        found = language[max(len(language) - rows, 0) :]
        return nn.functional.pad(found, (0, 0, rows - len(found), 0))

    def _of_clips(self, tokens: Mapping[str, Any]) -> torch.Tensor | None:
        """(L, N) the words of a CLIP's tokens; encoders write the same words into the same places."""
        if not self._encoders:
            return None
        part, name = next(iter(self._encoders.items()))
        own = self.phrases[part]
        ids = torch.tensor([_plain(tokens[name.removeprefix("clip_")], _NO_TOKEN)])
        # Also for experts that do not count: the denoiser knows them by their rows.
        return places_of(ids, {name: own.get(name, ()) for name in self._order})[0]

    def _of_language(self, tokens: Mapping[str, Any]) -> torch.Tensor | None:
        """(L, N) the words of a language model's tokens, without those of a chat around them."""
        if len(self._language) != 1 or self._language[0] not in tokens:
            return None
        (key,) = self._language
        tokenizer = tokenizer_of(self._tokenizers, key)
        if tokenizer is None:
            return None
        ids, blank = _plain(tokens[key], 0), _plain(self._blank[key], 0)
        phrases = {
            name: self._calling.of(self._experts[name]) if name in self._experts else ()
            for name in self._order
        }
        found = word_places(tokenizer, ids, (), phrases)
        start = _alike(ids, blank)
        end = _alike(ids[start:][::-1], blank[start:][::-1])
        found[:start] = 0
        found[len(ids) - end :] = 0
        return found


def is_read(mixtures: Iterable[Mixture]) -> bool:
    """Whether the attention of the networks that draw is read here, so that places are found."""
    drawing = [one for one in mixtures if one.in_picture]
    return all(one.finds_places and not adapts_text(one.network) for one in drawing)


def _plain(sections: Sequence[Sequence[Any]], other: int) -> list[int]:
    """The numbers of all tokens, one after the other; `other` where something else stands in their place."""
    tokens = [token[0] for section in sections for token in section]
    return [int(one) if isinstance(one, Integral) else other for one in tokens]


def _alike(some: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens are the same from the beginning."""
    pairs = enumerate(zip(some, others, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(some), len(others)))


def _numbers(sections: Sequence[Sequence[Any]]) -> torch.Tensor:
    """(B, L) numbers of tokens."""
    rows = [[int(one) if isinstance(one, Integral) else _NO_TOKEN for one in section] for section in sections]
    return torch.tensor(rows)
