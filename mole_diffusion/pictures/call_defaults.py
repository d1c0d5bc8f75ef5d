"""What a pipeline with experts is drawn with where a call does not say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mole_diffusion.pictures.components import call_arguments


def hand_on(old: Any, new: Any) -> None:
    """Let a pipeline around the same networks be drawn as another one is."""
    new.call_defaults = old.call_defaults
    # Set on a pipeline by itself where its model asks for another guidance or size than its class.
    for name in ("guided_by", "default_sample_size"):
        if name in vars(old):
            setattr(new, name, getattr(old, name))


def completed(pipe: Any, given: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, with what the pipeline is drawn with where the call does not say.

    Args:
        pipe: the pipeline.
        given: all arguments of the call.
        named: those that were given by name.
    """
    known = call_arguments(pipe)
    usual = {name: one for name, one in pipe.call_defaults.items() if name in known and name not in given}
    found = {**usual, **named}
    prompts, negative = given.get("prompt"), found.get("negative_prompt")
    if isinstance(negative, str) and isinstance(prompts, list):
        # One for all: some pipelines of diffusers refuse it, others fail in their networks.
        found["negative_prompt"] = [negative] * len(prompts)
    return found
