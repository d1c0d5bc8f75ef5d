"""Embeddings bundled in a LoRA file: trigger words that the expert brings along with their vectors.

Keys are those of AUTOMATIC1111 and OneTrainer: `bundle_emb.WORD.string_to_param.*` or `.emb_params` (one text
encoder), `bundle_emb.WORD.clip_l` and `.clip_g` (SDXL).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from .errors import ExpertLoadError
from .networks.clip import EMBEDDING_SLOTS, TEXT_ENCODER

_PREFIX = "bundle_emb."
_KEY = re.compile(r"^bundle_emb\.(?P<word>.+)\.(?P<vector>string_to_param\.[^.]+|emb_params|clip_l|clip_g)$")


class EmbeddingKey(NamedTuple):
    """What a key of a bundle means.

    Attributes:
        word: the trigger word.
        network: slot of the text encoder.
    """

    word: str
    network: str


def embedding_keys(keys: Iterable[str]) -> tuple[dict[str, EmbeddingKey], dict[str, str]]:
    """The keys of bundled embeddings among those of a file.

    Returns:
        key -> what it means; other keys of the bundle -> why they cannot be used.
    Raises:
        ExpertLoadError: two keys are the vectors of one word for one text encoder.
    """
    found: dict[str, EmbeddingKey] = {}
    ignored: dict[str, str] = {}
    first: dict[EmbeddingKey, str] = {}
    for key in keys:
        if not key.startswith(_PREFIX):
            continue
        match = _KEY.match(key)
        if match is None:
            ignored[key] = "not a vector of a bundled embedding of a known form"
            continue
        meaning = EmbeddingKey(match["word"], EMBEDDING_SLOTS.get(match["vector"], TEXT_ENCODER))
        other = first.setdefault(meaning, key)
        if other != key:
            raise ExpertLoadError(f"{key!r} and {other!r} are both the embedding of {meaning.word!r}.")
        found[key] = meaning
    return found, ignored


def embedding_vectors(key: str, tensor: Tensor) -> Tensor:
    """The vectors (n, d) of an embedding.

    Raises:
        ExpertLoadError: it has other axes than (n, d) or (d,).
    """
    if tensor.dim() not in (1, 2):
        raise ExpertLoadError(
            f"{key!r}: an embedding of shape {tuple(tensor.shape)}; allowed: (vectors, width)."
        )
    return tensor.reshape(-1, tensor.shape[-1])
