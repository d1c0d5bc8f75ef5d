"""Experts for transformers' sequence-to-sequence models: the T5 family."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .experts import Seq2SeqExperts, compose
    from .model import MoLEForSeq2SeqLM
    from .training import TextTrainingConfig, TextTrainingResult

_LAZY = {
    "MoLEForSeq2SeqLM": "model",
    "Seq2SeqExperts": "experts",
    "TextTrainingConfig": "training",
    "TextTrainingResult": "training",
    "compose": "experts",
}

__all__ = ["MoLEForSeq2SeqLM", "Seq2SeqExperts", "TextTrainingConfig", "TextTrainingResult", "compose"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
