"""Embeddings bundled in a LoRA file: trigger words that the expert brings along with their vectors.

Keys are those of AUTOMATIC1111 and OneTrainer: `bundle_emb.WORD.VECTORS`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from .errors import ExpertLoadError
from .networks.clip import EMBEDDING_SLOTS

_PREFIX = "bundle_emb."
_KEYS = tuple(
    (re.compile(rf"^bundle_emb\.(?P<word>.+)\.{vectors}$"), slot) for vectors, slot in EMBEDDING_SLOTS.items()
)


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
        meaning = next((EmbeddingKey(m["word"], slot) for one, slot in _KEYS if (m := one.match(key))), None)
        if meaning is None:
            ignored[key] = "not a vector of a bundled embedding of a known form"
            continue
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
