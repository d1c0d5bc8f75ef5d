"""Experts without gates: what the host's text encoders read says whose words are whose."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mole_diffusion import Expert
from mole_diffusion.core.auto import Auto, KnownText
from mole_diffusion.core.calling import Calling
from mole_diffusion.core.words import TokenPhrases, places_of

# A prompt as the host encodes it: its parts between AND, each as the texts that prompt editing makes of it.
Prompt = Sequence[Sequence[str]]

_ENCODE = "get_learned_conditioning"
# What a text is filled up with where another one of the same call is longer.
_NO_TOKEN = -1
# Texts that are kept; a picture has one for each step at most, and few have more than one.
_KEPT = 1024


class TextReader(Auto):
    """What the texts of a picture say of the experts.

    Hosts cut prompts into chunks, weigh words in parentheses and change texts while a picture is drawn. So it
    watches what they encode, asks them for the tokens, and knows a text again by what came out.

    Args:
        processors: part -> the host's object that makes tokens of texts, see `text_processors_of`.
        experts: all of the mixture, in its order.
        active: names of those that count.
    """

    def __init__(
        self, processors: Mapping[str, Any], experts: Iterable[Expert], active: Iterable[str]
    ) -> None:
        everybody = {expert.name: expert for expert in experts}
        self._experts = {name: everybody[name] for name in active}
        self._calling = Calling()
        self._processor = next(iter(processors.values()))
        self._kept: dict[tuple[str, bool | None], KnownText] = {}
        self._listening: Any = None
        super().__init__({part: self._phrases(one) for part, one in processors.items()})
        # Encoders write the same words into the same places.
        own = next(iter(self.phrases.values()))
        self._places = {name: own.get(name, ()) for name in everybody}

    def _phrases(self, processor: Any) -> TokenPhrases:
        """The experts' phrases in the tokens of one encoder."""
        return {
            name: [list(processor.tokenize([phrase])[0]) for phrase in self._calling.of(expert)]
            for name, expert in self._experts.items()
        }

    def attach(self, sd_model: Any) -> None:
        """Hear what a host's model encodes."""
        self.detach()
        encode, before = getattr(sd_model, _ENCODE), vars(sd_model).get(_ENCODE)

        def noting(texts: Any, *args: Any, **kwargs: Any) -> Any:
            encoded = encode(texts, *args, **kwargs)
            if self._listening is not None:
                # Hosts say so of their lists of texts.
                negative = getattr(texts, "is_negative_prompt", None)
                self._note(list(texts), encoded, None if negative is None else not negative)
            return encoded

        # Not by assignment, for which PyTorch's modules have rules of their own.
        vars(sd_model)[_ENCODE] = noting
        self._listening = sd_model, noting, before

    def detach(self) -> None:
        """Stop that; doing it twice does no harm."""
        if self._listening is None:
            return
        sd_model, noting, before = self._listening
        self._listening = None
        # Another extension may have put itself around it, and then it stays and says nothing.
        if vars(sd_model).get(_ENCODE) is noting:
            if before is None:
                del vars(sd_model)[_ENCODE]
            else:
                vars(sd_model)[_ENCODE] = before

    def _note(self, texts: list[str], encoded: Any, prompt: bool | None) -> None:
        """Remember what came out of some texts; what is not a text per row is not known again."""
        found = encoded.get("crossattn") if isinstance(encoded, Mapping) else encoded
        if not isinstance(found, Tensor) or found.dim() != 3:
            return
        ids = self._tokens(texts)
        if ids.shape != found.shape[:2]:
            return
        places = places_of(ids, self._places)
        for text, one, own in zip(texts, found.detach(), places, strict=True):
            twin = None if prompt is None else self._kept.get((text, not prompt))
            if twin is not None:  # nobody can tell which of the two the UNet is given
                twin.prompt = None
            self._kept.pop((text, prompt), None)
            self._kept[text, prompt] = KnownText(one, own, None if twin is not None else prompt)
        for key in list(self._kept)[:-_KEPT]:
            del self._kept[key]
        self.texts[:] = self._kept.values()

    def _tokens(self, texts: list[str]) -> Tensor:
        """(B, L) numbers of the tokens, chunk by chunk as the host encodes them."""
        chunks, _ = self._processor.process_texts(texts)
        rows = [[int(token) for chunk in own for token in chunk.tokens] for own in chunks]
        length = max(len(row) for row in rows)
        return torch.tensor([row + [_NO_TOKEN] * (length - len(row)) for row in rows])

    def read(self, passes: Sequence[Sequence[Prompt]]) -> str | None:
        """The prompts of a batch, before they are encoded: who counts everywhere, and how many pictures.

        Args:
            passes: the prompts of each pass; hires fix may have other ones.
        Returns:
            Why they cannot be told apart; None where they can.
        """
        self.continues = False
        self.single = len(passes[0]) == 1
        texts = dict.fromkeys(text for prompts in passes for one in prompts for part in one for text in part)
        named = {text: self._named(text) for text in texts}
        everybody = frozenset[str]().union(*named.values())
        self.count_everywhere(self._calling.everywhere(sorted(everybody), self._experts), everybody)
        return self._twins() or self._styles(named) or _rows(passes)

    def forget(self) -> None:
        """The host will encode its texts anew."""
        self._kept.clear()
        self.texts.clear()

    def counting_everywhere(self) -> list[str]:
        """Names of the experts that nobody can name, which count in the whole picture."""
        return [name for name in self.everywhere if self._calling.is_mute(self._experts[name])]

    def _named(self, text: str) -> frozenset[str]:
        """The experts whose phrases stand in a text."""
        places = places_of(self._tokens([text]), self._places)[0].any(0).tolist()
        return frozenset(name for name, found in zip(self._places, places, strict=True) if found)

    def _twins(self) -> str | None:
        owners: dict[tuple[int, ...], str] = {}
        for name, phrases in self._places.items():
            for phrase in phrases:
                other = owners.setdefault(tuple(phrase), name)
                if other != name:
                    return f"{other!r} and {name!r} are called by the same words"
        return None

    def _styles(self, named: Mapping[str, frozenset[str]]) -> str | None:
        """A style counts in the whole picture: where only some of its texts name it, it cannot."""
        for name, expert in self._experts.items():
            if self._calling.is_style(expert) and len({name in own for own in named.values()}) > 1:
                return f"the style {name!r} is named in some of the texts and not in others"
        return None


def _rows(passes: Sequence[Sequence[Prompt]]) -> str | None:
    """Why the rows of a batch cannot be told apart."""
    for prompts in passes:
        if len(prompts) > 1 and any(len(prompt) > 1 for prompt in prompts):
            return "AND in a batch of several pictures: draw them one after another (batch size 1)"
    return None
