"""What `pipe(prompt, mixture=...)` may be: words, weights, and methods that take the networks over."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from mole_diffusion.core.errors import ConfigError, NoExpertsError
from mole_diffusion.core.fixed import FIXED, fixed_mixture
from mole_diffusion.core.holding import HoldsExperts
from mole_diffusion.core.mixture_set import Choice

#: Registers more words when it is imported; it lies above this room, which knows none of its names.
_MORE = "mole_diffusion.methods"


@dataclass(frozen=True)
class Request:
    """The options of a call beside the mixture; see `WithExperts.composing`."""

    active_experts: Sequence[str] | None = None
    expert_scales: Mapping[str, float] | None = None
    region_masks: Mapping[str, torch.Tensor] | None = None
    latent_size: tuple[int, int] | None = None

    def refuse_options(self, label: str) -> None:
        """Raise ConfigError if an option asks for single experts of a method that has none left."""
        given = {
            "active_experts": self.active_experts is not None,
            "expert_scales": bool(self.expert_scales),
            "region_masks": bool(self.region_masks),
        }
        if any(given.values()):
            names = ", ".join(name for name, is_given in given.items() if is_given)
            raise ConfigError(f"{label} is one piece, its experts cannot be told apart: {names} not allowed")

    def arguments(self) -> dict[str, Any]:
        """As keyword arguments of `composing`."""
        return dict(vars(self))


@runtime_checkable
class Engaging(Protocol):
    """A way of combining experts that decides itself how the networks compute."""

    def engaged(self, pipe: Any, request: Request) -> AbstractContextManager[None]:
        """Let the pipeline's networks compute so inside the `with` block.

        Args:
            pipe: a pipeline with experts.
            request: the options of the call; the method honours them or refuses.
        """


_words: dict[str, Engaging] = {}


def register(word: str, method: Engaging) -> None:
    """Let `pipe(prompt, mixture=word)` mean this method.

    Raises:
        ValueError: the word means something already.
    """
    if word in FIXED or _words.get(word, method) is not method:
        raise ValueError(f"the mixture {word!r} means something already")
    _words[word] = method


def words() -> tuple[str, ...]:
    """All words for `mixture`."""
    importlib.import_module(_MORE)
    return (*FIXED, *_words)


def method_of(mixture: str | Mapping[str, float] | Engaging) -> Engaging | None:
    """The method that is meant; None where gates or fixed weights mix the experts.

    Raises:
        ConfigError: an unknown word.
    """
    if isinstance(mixture, Engaging):
        return mixture
    if not isinstance(mixture, str) or mixture in FIXED:
        return None
    if mixture not in words():
        raise ConfigError(f"mixture is {mixture!r}, expected one of {list(words())} or a weight per expert")
    return _words[mixture]


@contextmanager
def chosen_by(
    pipe: HoldsExperts, mixture: str | Mapping[str, float] | Engaging, request: Request
) -> Iterator[None]:
    """Let experts count so inside the `with` block; see `WithExperts.composing`.

    Args:
        pipe: a pipeline with experts.
        mixture: a word, fixed weights, or a method.
        request: the other options.

    Raises:
        NoExpertsError: something is asked of experts and none is loaded.
        MoLEError: see `WithExperts.composing`.
    """
    ensemble, method = pipe.ensemble, method_of(mixture)
    if method is not None:
        with ensemble.in_use(), method.engaged(pipe, request):
            yield
        return
    assert not isinstance(mixture, Engaging)
    scales, regions, size = request.expert_scales, request.region_masks, request.latent_size
    plain = request.active_experts is None and not scales and not regions
    if not ensemble.experts and not (plain and mixture in ("gates", "none")):
        raise NoExpertsError("no experts are loaded: call load_expert() first")
    active, weights = fixed_mixture(mixture, list(ensemble.experts), request.active_experts)
    with ensemble.choosing(Choice(active, scales, regions, size, weights, base_only=mixture == "none")):
        yield
