"""Trained gates in a pipeline: styles and subjects are kept in balance while a picture is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.pictures.auto import PromptKinds
from mole_diffusion.pictures.choosing import Engaging, Request, chosen_by


@contextmanager
def keeping_styles(pipe: Any) -> Iterator[None]:
    """Keep styles in balance inside the `with` block, where trained gates mix them with other experts."""
    ensemble = pipe.ensemble
    choice = ensemble.balanced(ensemble.choice, lambda: PromptKinds(pipe))
    with nullcontext() if choice is ensemble.choice else ensemble.choosing(choice):
        yield


@dataclass(frozen=True)
class InBalance:
    """Gates that keep styles in another balance, as what `pipe(prompt, mixture=...)` means.

    Attributes:
        mixture: what `pipe(prompt, mixture=...)` takes.
        balance: see `Styled`; 0 leaves the gates alone.
    """

    mixture: str | Mapping[str, float] | Engaging
    balance: float

    @contextmanager
    def engaged(self, pipe: Any, request: Request) -> Iterator[None]:
        """Let the pipeline's networks compute so inside the `with` block.

        Raises:
            ConfigError: no gates mix the experts.
        """
        ensemble = pipe.ensemble
        before, ensemble.style_balance = ensemble.style_balance, self.balance
        try:
            with chosen_by(pipe, self.mixture, request):
                if not ensemble.choice.gated:
                    raise ConfigError(f"a balance goes with gates alone, and mixture is {self.mixture!r:.60}")
                yield
        finally:
            ensemble.style_balance = before
