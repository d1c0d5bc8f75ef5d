"""Whose words the tokens are that a transformer reads, whatever a pipeline's text encoders make of a prompt.

Some write a chat around it, some leave a part of that out, some put two encoders' tokens one after another.
So the tokens are those that the encoders were run with, and words are found in what these say in plain text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mole_diffusion.core.modules import unwrapped
from mole_diffusion.core.words import word_places


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
