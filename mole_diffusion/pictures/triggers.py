"""Embeddings that experts bring along: trigger words in a tokenizer, their vectors in a text encoder."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mole_diffusion.core.errors import ExpertLoadError
from mole_diffusion.core.experts import Expert


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
        self._encoder: Any = getattr(text_encoder, "_orig_mod", text_encoder)
        self._tokens = self._name_tokens(words)
        self._vectors = torch.cat([vectors.detach() for own in words.values() for vectors in own.values()])
        self._base: dict[str, Any] = tokenizer.__dict__
        self._extended: dict[str, Any] = copy.deepcopy(self._base)
        self._first = self._extend()
        self._positions: Tensor | None = None
        self._table: nn.Module | None = None
        self._handles: list[RemovableHandle] = []

    def _name_tokens(self, words: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
        """Every token once, checked against the vocabulary and the table's width."""
        vocabulary = self._tokenizer.get_vocab()
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
                    owner = owners.get(token)
                    if owner is not None or token in vocabulary:
                        whose = "the tokenizer" if owner is None else f"expert {owner!r}"
                        raise ExpertLoadError(
                            f"expert {name!r} brings an embedding for {token!r}, which {whose} has already"
                        )
                    owners[token] = name
        return list(owners)

    def _extend(self) -> int:
        """Add the tokens to the copy of the tokenizer; returns the first one's number."""
        from transformers import AddedToken

        self._tokenizer.__dict__ = self._extended
        try:
            # "zip" is no part of "zipper".
            self._tokenizer.add_tokens([AddedToken(token, single_word=True) for token in self._tokens])
            numbers: list[int] = self._tokenizer.convert_tokens_to_ids(self._tokens)
        finally:
            self._tokenizer.__dict__ = self._base
        if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            raise ExpertLoadError(f"the tokenizer numbered {self._tokens} as {numbers}, not one by one")
        return numbers[0]

    def attach(self) -> None:
        """Let the words be known."""
        self._tokenizer.__dict__ = self._extended
        self._handles = [self._encoder.register_forward_pre_hook(self._before, with_kwargs=True)]

    def check_removable(self) -> None:
        """Refuse to go while somebody else's tokens follow ours: those would be lost.

        Raises:
            ExpertLoadError: tokens were added since.
        """
        if not self._is_last():
            raise ExpertLoadError(
                f"tokens were added to the tokenizer after the trigger words {self._tokens} of the experts;"
                " take those away first (unload_textual_inversion)"
            )

    def detach(self) -> None:
        """Tokenizer and text encoder are what they were."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._table, self._positions = [], None, None
        self._tokenizer.__dict__ = self._base

    def show(self, shown: bool) -> None:
        """Let the words be known to the tokenizer, or for a while not."""
        # Where somebody's tokens follow ours, both stay: without ours, theirs would have other numbers.
        if self._is_last():
            self._tokenizer.__dict__ = self._extended if shown else self._base

    def _is_last(self) -> bool:
        known = self._tokenizer.__dict__
        return known is self._base or len(self._tokenizer) == self._first + len(self._tokens)

    def _before(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hide our tokens from the text encoder and remember where they stand."""
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
