"""Samplers by the names that web UIs give them, for a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mole_diffusion.core.errors import ConfigError

#: Name -> scheduler class of diffusers; of those that draw with any model here.
SAMPLERS = {
    "Euler": "EulerDiscreteScheduler",
    "Euler a": "EulerAncestralDiscreteScheduler",
    "DPM++ 2M": "DPMSolverMultistepScheduler",
    "DDIM": "DDIMScheduler",
    "UniPC": "UniPCMultistepScheduler",
    "Heun": "HeunDiscreteScheduler",
    "LMS": "LMSDiscreteScheduler",
}
#: What is drawn with is told by these names too.
_OTHERS = {"PNDMScheduler": "PLMS"}


def sampler_of(pipe: Any) -> str:
    """The name of the sampler that a pipeline draws with."""
    kind = type(pipe.scheduler).__name__
    return next((name for name, known in SAMPLERS.items() if known == kind), _OTHERS.get(kind, kind))


@contextmanager
def sampling(pipe: Any, name: str) -> Iterator[None]:
    """Let a pipeline draw with another sampler inside the `with` block.

    Args:
        pipe: a diffusers pipeline.
        name: of `SAMPLERS`; empty for the model's own.

    Raises:
        ConfigError: an unknown name, or one that the model does not go with.
    """
    if not name:
        yield
        return
    import diffusers

    if name not in SAMPLERS:
        raise ConfigError(f"sampler is {name!r}; allowed are {', '.join(map(repr, SAMPLERS))}")
    before = pipe.scheduler
    if not hasattr(before, "add_noise") or "Flow" in type(before).__name__:
        raise ConfigError(f"sampler is {name!r}; this model draws with its own, {sampler_of(pipe)!r}, only")
    pipe.scheduler = getattr(diffusers, SAMPLERS[name]).from_config(before.config)
    try:
        yield
    finally:
        pipe.scheduler = before
