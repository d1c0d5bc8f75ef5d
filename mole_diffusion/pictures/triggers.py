"""Embeddings that experts bring along: trigger words in a tokenizer, their vectors in a text encoder."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mole_diffusion.core.errors import ExpertLoadError
from mole_diffusion.core.experts import Expert
from mole_diffusion.core.modules import unwrapped

logger = logging.getLogger(__name__)


def vectors_of(experts: Iterable[Expert], part: str) -> dict[str, dict[str, Tensor]]:
    """Expert name -> trigger word -> vectors (n, d) for one text encoder."""
    chosen = {
        expert.name: {word: found[part] for word, found in expert.embeddings.items() if part in found}
        for expert in experts
    }
    return {name: words for name, words in chosen.items() if words}


class TriggerWords:
    """Trigger words of experts in one tokenizer, and what its text encoder reads for them.

    The text encoder's table of embeddings stays as it is: forward hooks give ordinary tokens to its layers in
    place of the added ones and put the vectors where those stand. So what finds the end of a text by its
    token's number (the pooled text of SDXL does) still finds it. A word of several vectors is several tokens,
    "word", "word_1", "word_2" ..., as diffusers has them: its pipelines write them out in prompts.

    Ours come last. Textual inversions that somebody loads while they are there get the numbers behind them;
    those are moved down, with their rows of the table, when ours are taken away or hidden.

    Args:
        tokenizer: of the text encoder; its content is changed in place, for pipelines share it.
        text_encoder: a CLIP text model.
        words: from `vectors_of`.
    Raises:
        ExpertLoadError: a word is a token already, two experts bring the same one, or the width is wrong.
    """

    def __init__(
        self, tokenizer: Any, text_encoder: nn.Module, words: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        self._tokenizer = tokenizer
        self._encoder: Any = unwrapped(text_encoder)
        self._owners = self._name_tokens(words)
        self._tokens = list(self._owners)
        self._vectors = torch.cat([vectors.detach() for own in words.values() for vectors in own.values()])
        self._base: dict[str, Any] = {}
        self._known: dict[str, int] = {}
        self._extended: dict[str, Any] = {}
        self._first = self._rows = -1
        self._extend()
        self._shown = False
        self._positions: Tensor | None = None
        self._table: nn.Module | None = None
        self._handles: list[RemovableHandle] = []

    def _name_tokens(self, words: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
        """Token -> expert, every token once, checked against the table's width."""
        width = self._encoder.get_input_embeddings().weight.shape[1]
        owners: dict[str, str] = {}
        for name, own in words.items():
            for word, vectors in own.items():
                if vectors.shape[1] != width:
                    raise ExpertLoadError(
                        f"expert {name!r}: its embedding {word!r} is {vectors.shape[1]} wide, those of this"
                        f" {type(self._encoder).__name__} are {width}"
                    )
                for token in [word, *(f"{word}_{i}" for i in range(1, len(vectors)))]:
                    if token in owners:
                        self._refuse(token, name, f"expert {owners[token]!r}")
                    owners[token] = name
        return owners

    @staticmethod
    def _refuse(token: str, expert: str, whose: str) -> NoReturn:
        raise ExpertLoadError(
            f"expert {expert!r} brings an embedding for {token!r}, which {whose} has already"
        )

    def _extend(self) -> None:
        """Make a copy of the tokenizer, as it is without ours, that knows our tokens.

        Raises:
            ExpertLoadError: it has one of our tokens already.
        """
        from transformers import AddedToken

        known = self._tokenizer.get_added_vocab()
        if self._extended and self._base is self._tokenizer.__dict__ and self._known == known:
            return
        vocabulary = self._tokenizer.get_vocab()
        for token, expert in self._owners.items():
            if token in vocabulary:
                self._refuse(token, expert, "the tokenizer")
        self._base, self._known = self._tokenizer.__dict__, known
        self._extended = copy.deepcopy(self._base)
        self._tokenizer.__dict__ = self._extended
        try:
            # "zip" is no part of "zipper".
            self._tokenizer.add_tokens([AddedToken(token, single_word=True) for token in self._tokens])
            numbers: list[int] = self._tokenizer.convert_tokens_to_ids(self._tokens)
        finally:
            self._tokenizer.__dict__ = self._base
        if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            raise ExpertLoadError(f"the tokenizer numbered {self._tokens} as {numbers}, not one by one")
        self._first, self._rows = numbers[0], len(self._encoder.get_input_embeddings().weight)

    def attach(self) -> None:
        """Let the words be known.

        Raises:
            ExpertLoadError: the tokenizer has got one of the words meanwhile.
        """
        self._extend()
        self._tokenizer.__dict__, self._shown = self._extended, True
        self._handles = [self._encoder.register_forward_pre_hook(self._before, with_kwargs=True)]

    def detach(self) -> None:
        """Tokenizer and text encoder are what they were, but for what others added to them."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._table, self._positions = [], None, None
        self._hide()

    def show(self, shown: bool) -> None:
        """Let the words be known to the tokenizer, or for a while not."""
        if not shown:
            self._hide()
        elif self._tokenizer.__dict__ is self._base or not self._is_last():
            self._hide()
            self._extend()
            self._tokenizer.__dict__, self._shown = self._extended, True

    def _is_last(self) -> bool:
        return len(self._tokenizer) == self._first + len(self._tokens)

    def _hide(self) -> None:
        """The tokenizer as it is without ours; what came behind them moves down."""
        self._shown = False
        if self._tokenizer.__dict__ is not self._extended:
            return
        theirs = {
            number: token
            for number, token in sorted(self._tokenizer.added_tokens_decoder.items())
            if token.content not in self._known and token.content not in self._owners
        }
        if theirs or not self._is_last():
            self._extended = {}  # others changed it
        self._tokenizer.__dict__ = self._base
        weight = self._encoder.get_input_embeddings().weight
        if theirs and weight.is_meta:
            logger.warning(
                "load the textual inversions %s again: the text encoder's table is offloaded, and their rows"
                " in it cannot be moved",
                [token.content for token in theirs.values()],
            )
            return
        if theirs:
            self._tokenizer.add_tokens(list(theirs.values()))
            numbers = self._tokenizer.convert_tokens_to_ids([token.content for token in theirs.values()])
            with torch.no_grad():
                for old, new in zip(theirs, numbers, strict=True):
                    weight.data[new] = weight.data[old].clone()
        # Whoever added rows to the table added some for ours, which are at its end now.
        surplus = len(weight) - self._rows - len(theirs)
        if 0 < surplus <= len(self._tokens):
            self._encoder.resize_token_embeddings(len(weight) - surplus)

    def _before(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hide our tokens from the text encoder and remember where they stand."""
        self._positions = None
        if not self._shown:  # our numbers may be others' now
            return args, kwargs
        # Looked up each time: adding tokens to a text encoder puts another table into it.
        table = self._encoder.get_input_embeddings()
        if table is not self._table:
            for handle in self._handles[1:]:
                handle.remove()
            self._handles[1:] = [table.register_forward_hook(self._after)]
            self._table = table
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        places = ids - self._first
        ours = (places >= 0) & (places < len(self._tokens))
        self._positions = torch.where(ours, places, -1)
        plain = torch.where(ours, torch.zeros_like(ids), ids)
        if "input_ids" in kwargs:
            return args, {**kwargs, "input_ids": plain}
        return (plain, *args[1:]), kwargs

    def _after(self, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        """Put the vectors where our tokens stand."""
        places = self._positions
        if places is None or places.shape != output.shape[:-1]:
            return output
        vectors = self._vectors.to(output.device, output.dtype)[places.clamp(min=0).to(output.device)]
        return torch.where((places >= 0)[..., None].to(output.device), vectors, output)
