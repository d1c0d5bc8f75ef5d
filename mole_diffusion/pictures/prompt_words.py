"""Whose words the tokens are that a transformer reads, whatever a pipeline's text encoders make of a prompt.

Some write a chat around it, some leave a part of that out, some put two encoders' tokens one after another.
So the tokens are those that the encoders were run with, and words are found in what these say in plain text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mole_diffusion.core.modules import unwrapped


@dataclass(frozen=True)
class TextLayout:
    """Where a family's transformer has the tokens of a text.

    Attributes:
        read: (network that reads the tokens, its tokenizer), one after another in the text.
        packed: whether the pipeline leaves out padding.
        negative: where in what `encode_prompt` returns the negative prompts are; None where a pipeline
            encodes them by a call of their own.
    """

    read: tuple[tuple[str, str], ...] = (("text_encoder", "tokenizer"),)
    packed: bool = False
    negative: int | None = None


# Class of a pipeline's transformer -> its texts.
_LAYOUTS = {
    "FluxTransformer2DModel": TextLayout((("text_encoder_2", "tokenizer_2"),)),
    "ChromaTransformer2DModel": TextLayout(negative=3),
    "CosmosTransformer3DModel": TextLayout((("text_conditioner", "t5_tokenizer"),), negative=1),
    "Flux2Transformer2DModel": TextLayout(),
    "Krea2Transformer2DModel": TextLayout(),
    "QwenImageTransformer2DModel": TextLayout(packed=True),
    "SD3Transformer2DModel": TextLayout(
        (("text_encoder", "tokenizer"), ("text_encoder_3", "tokenizer_3")), negative=1
    ),
    "ZImageTransformer2DModel": TextLayout(packed=True, negative=1),
}


def layout_of(pipe: Any) -> TextLayout | None:
    """How a pipeline's transformer reads texts; None of one with a UNet, whose text encoders say so."""
    transformer = getattr(pipe, "transformer", None)
    return None if transformer is None else _LAYOUTS.get(type(unwrapped(transformer)).__name__)


#: Network -> tokens (B, L) and their mask or None, of each of its runs.
Runs = dict[str, list[tuple[Tensor, Tensor | None]]]


@contextmanager
def watched_tokens(pipe: Any, layout: TextLayout) -> Iterator[Runs]:
    """Note what a pipeline's text encoders read inside the `with` block."""
    runs: Runs = {}

    def watch(name: str, network: nn.Module) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            ids = kwargs.get("target_input_ids", kwargs.get("input_ids", args[0] if args else None))
            if isinstance(ids, Tensor):
                mask = kwargs.get("attention_mask")
                runs.setdefault(name, []).append((ids.cpu(), None if mask is None else mask.bool().cpu()))

        return network.register_forward_pre_hook(before, with_kwargs=True)

    found = [(name, getattr(pipe, name, None)) for name, _ in layout.read]
    handles = [watch(name, network) for name, network in found if network is not None]
    try:
        yield runs
    finally:
        for handle in handles:
            handle.remove()


class WordPlaces:
    """Finds the experts' words among the tokens that a transformer reads.

    Args:
        pipe: the pipeline.
        layout: how its transformer reads texts.
        phrases: of all experts, in the order of the mixture's rows; none of those that do not count.
    """

    def __init__(self, pipe: Any, layout: TextLayout, phrases: Mapping[str, Sequence[str]]) -> None:
        self._pipe, self._layout, self._phrases = pipe, layout, phrases

    def of(self, runs: Runs, number: int, texts: Sequence[str], lengths: Sequence[int]) -> list[Tensor]:
        """(L, N) of each encoded text, 1 where a token is part of an expert's phrase, else 0.

        Args:
            runs: what the text encoders read.
            number: which of their runs made these texts.
            texts: prompts that stand in them.
            lengths: L of each; where they are more than was read, several in a row are of one text.
        """
        parts = []
        for network, tokenizer in self._layout.read:
            if number < len(runs.get(network, ())):
                parts.append(self._read(*runs[network][number], getattr(self._pipe, tokenizer), texts))
        count = max(map(len, parts), default=0)
        if not count:
            return [torch.zeros(length, len(self._phrases)) for length in lengths]
        whole = [torch.cat([part[row] for part in parts]) for row in range(count)]
        times = len(lengths) // count
        return [_of_length(whole[row // times], length) for row, length in enumerate(lengths)]

    def _read(self, ids: Tensor, mask: Tensor | None, tokenizer: Any, texts: Sequence[str]) -> list[Tensor]:
        """(l, N) of each text that one network read."""
        found = []
        for row, numbers in enumerate(ids.tolist()):
            places = word_places(tokenizer, numbers, texts, self._phrases)
            if self._layout.packed and mask is not None:
                places = places[mask[row]]
            # A chat's beginning.
            found.append(places[getattr(self._pipe, "prompt_template_encode_start_idx", 0) :])
        return found


def _of_length(places: Tensor, length: int) -> Tensor:
    """Cut, or with tokens of nobody at the end."""
    return nn.functional.pad(places[:length], (0, 0, 0, max(length - len(places), 0)))


def word_places(
    tokenizer: Any, ids: Sequence[int], texts: Sequence[str], phrases: Mapping[str, Sequence[str]]
) -> Tensor:
    """Which tokens are whose words.

    A longer phrase has its tokens before a shorter one, so that "red boot" is not taken for "boot".

    Args:
        tokenizer: whose numbers these are; or a processor with one.
        ids: of one text.
        texts: prompts; words are looked for in the longest that stands there, or everywhere if none does.
        phrases: of N experts.
    Returns:
        (L, N) 1 where a token is part of an expert's phrase, else 0.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    said, ends = _text(tokenizer, ids), _ends(tokenizer, ids)
    tokens = zip([0, *ends], ends, strict=False)
    written = [(start, end) if said[start:end].strip() else (0, 0) for start, end in tokens]
    found = torch.zeros(len(ids), len(phrases))
    around = _within(said, texts, tokenizer)
    wanted = [(index, one) for index, own in enumerate(phrases.values()) for one in own if one.strip()]
    for index, phrase in sorted(wanted, key=lambda pair: -len(pair[1])):
        for first, last in _spans(said, phrase, tokenizer, around):
            own = [one for one, (start, end) in enumerate(written) if start < last and end > first]
            if own and not found[own].any():
                found[own, index] = 1.0
    return found


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _ends(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Where in the plain text each token ends; padding at the end of it is not looked at."""
    count = len(ids)
    while count and ids[count - 1] == tokenizer.pad_token_id:
        count -= 1
    ends = [len(_text(tokenizer, ids[: one + 1])) for one in range(count)]
    return ends + (ends[-1:] or [0]) * (len(ids) - count)


def _forms(tokenizer: Any, words: str) -> list[str]:
    """Some words, and what the tokenizer makes of them: letters that it does not know are others there."""
    known = _text(tokenizer, tokenizer(words, add_special_tokens=False).input_ids)
    bare = known.replace(str(tokenizer.unk_token), "") if tokenizer.unk_token else known
    return [words, known] if bare.strip() else [words]


def _pattern(words: str) -> str:
    """Finds words with any spaces between them; tokenizers have their own."""
    return r"\s*".join(re.escape(word) for word in words.split())


def _within(said: str, texts: Sequence[str], tokenizer: Any) -> tuple[int, int]:
    """Where the longest of the texts stands; everywhere if none does, nowhere if one of them is blank."""
    for text in sorted(texts, key=len, reverse=True):
        for form in _forms(tokenizer, text) if text.strip() else ():
            if matches := list(re.finditer(_pattern(form), said, re.IGNORECASE)):
                return matches[-1].span()
    return (0, len(said)) if all(text.strip() for text in texts) else (0, 0)


def _spans(said: str, phrase: str, tokenizer: Any, around: tuple[int, int]) -> list[tuple[int, int]]:
    """Where a phrase stands in a part of a text."""
    for form in _forms(tokenizer, phrase):
        pattern = re.compile(rf"(?<!\w){_pattern(form)}(?!\w)", re.IGNORECASE)
        if found := [match.span() for match in pattern.finditer(said, *around)]:
            return found
    return []
