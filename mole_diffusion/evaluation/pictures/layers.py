"""Experts in a range of their layers, as one method among the others (paper: Fig. 3)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mole_diffusion.evaluation.layers import in_blocks
from mole_diffusion.pictures.choosing import Request


@dataclass(frozen=True)
class InLayers:
    """All experts in full, in some of their blocks alone, as what `pipe(prompt, mixture=...)` means.

    Attributes:
        low, high: see `in_blocks`.
    """

    low: float
    high: float

    @contextmanager
    def engaged(self, pipe: Any, request: Request) -> Iterator[None]:
        """Let the pipeline's networks compute so inside the `with` block."""
        ensemble = pipe.ensemble
        parts = [in_blocks(one, ensemble.mixtures, self.low, self.high) for one in ensemble.experts.values()]
        with ensemble.standing_in(ensemble.build(parts)), pipe.composing(mixture="la", **request.arguments()):
            yield
