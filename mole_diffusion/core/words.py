"""Where the phrases of experts stand among the tokens of a text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: Expert name -> its phrases, each as the tokens it has in any text; none for an expert without phrases.
TokenPhrases = Mapping[str, Sequence[Sequence[int]]]


def places_of(ids: Tensor, phrases: TokenPhrases) -> Tensor:
    """Which tokens of texts are whose words.

    A longer phrase has its tokens before a shorter one, so that "red boot" is not taken for "boot".

    Args:
        ids: (B, L) numbers of tokens.
        phrases: of N experts.
    Returns:
        (B, L, N) 1 where a token is part of an expert's phrase, else 0; each token belongs to one expert at
        most. On the CPU.
    """
    rows = ids.tolist()
    found = torch.zeros(len(rows), ids.shape[1], len(phrases))
    wanted = sorted(
        ((index, list(phrase)) for index, own in enumerate(phrases.values()) for phrase in own if phrase),
        key=lambda pair: -len(pair[1]),
    )
    for entry, row in enumerate(rows):
        taken = [False] * len(row)
        for index, phrase in wanted:
            size = len(phrase)
            for start in range(len(row) - size + 1):
                if row[start : start + size] == phrase and not any(taken[start : start + size]):
                    taken[start : start + size] = [True] * size
                    found[entry, start : start + size, index] = 1.0
    return found


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
