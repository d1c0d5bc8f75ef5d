"""Where the phrases of experts stand among the tokens of a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
