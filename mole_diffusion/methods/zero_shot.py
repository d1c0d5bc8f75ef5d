"""Methods that need neither training nor a prompt's words: each matrix chooses by the experts' weights.

Arrow and "energy" go token by token (see `core.routing`); K-LoRA gives every matrix to one expert, at every
step anew where styles are among them (Ouyang et al. 2025, arXiv 2502.18461; its rule as published).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mole_diffusion.core.calling import Calling
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.mixture_set import Choice
from mole_diffusion.core.routing import LARGEST, ROUTES, Route
from mole_diffusion.pictures.choosing import Request, register

KLORA = "klora"
ZERO_SHOT = (*ROUTES, KLORA)


@dataclass(frozen=True)
class ZeroShot:
    """One of them, as what `pipe(prompt, mixture=word)` means.

    Attributes:
        word: "arrow", "energy" or "klora".
    """

    word: str

    @contextmanager
    def engaged(self, pipe: Any, request: Request) -> Iterator[None]:
        """Let the pipeline's networks compute so inside the `with` block.

        Raises:
            NoExpertsError, UnknownExpertError, AllExpertsMaskedError: as for any mixture.
            ConfigError: there are region masks.
        """
        pipe.need_experts(f"mixture={self.word!r}")
        if request.region_masks:
            raise ConfigError(f"mixture={self.word!r} knows no places: region_masks are not allowed")
        with pipe.ensemble.choosing(
            Choice(request.active_experts, request.expert_scales, route=self._route(pipe))
        ):
            yield

    def _route(self, pipe: Any) -> Route:
        if self.word != KLORA:
            return Route(self.word)
        is_style = Calling().is_style
        styles = (index for index, expert in enumerate(pipe.experts.values()) if is_style(expert))
        return Route(LARGEST, growing=frozenset(styles))


for _word in ZERO_SHOT:
    register(_word, ZeroShot(_word))
