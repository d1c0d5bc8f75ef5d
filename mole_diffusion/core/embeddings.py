"""Embeddings bundled in a LoRA file: trigger words that the expert brings along with their vectors.

Keys are those of AUTOMATIC1111 and OneTrainer: `bundle_emb.WORD.string_to_param.*` or `.emb_params` (one text
encoder), `bundle_emb.WORD.clip_l` and `.clip_g` (SDXL).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from .errors import ExpertLoadError
from .networks.clip import EMBEDDING_SLOTS, TEXT_ENCODER

_PREFIX = "bundle_emb."
_KEY = re.compile(r"^bundle_emb\.(?P<word>.+)\.(?P<vector>string_to_param\.[^.]+|emb_params|clip_l|clip_g)$")


def split_embeddings(
    state_dict: Mapping[str, Tensor],
) -> tuple[dict[str, dict[str, Tensor]], set[str], dict[str, str]]:
    """Embeddings of a file.

    Returns:
        trigger word -> text encoder -> vectors (n, d); the keys used; other keys of the bundle with reasons.
    Raises:
        ExpertLoadError: an embedding has other axes than (n, d) or (d,).
    """
    embeddings: dict[str, dict[str, Tensor]] = {}
    used: set[str] = set()
    ignored: dict[str, str] = {}
    for key, tensor in state_dict.items():
        if not key.startswith(_PREFIX):
            continue
        match = _KEY.match(key)
        if match is None:
            ignored[key] = "not a vector of a bundled embedding of a known form"
            continue
        if tensor.dim() not in (1, 2):
            raise ExpertLoadError(
                f"{key!r}: an embedding of shape {tuple(tensor.shape)}; allowed: (vectors, width)."
            )
        network = EMBEDDING_SLOTS.get(match["vector"], TEXT_ENCODER)
        embeddings.setdefault(match["word"], {})[network] = tensor.reshape(-1, tensor.shape[-1])
        used.add(key)
    return embeddings, used, ignored
