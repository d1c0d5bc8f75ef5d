"""Which step, branch and picture of a call each forward of a pipeline's networks belongs to."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from mole_diffusion.core.mixture import Mixture
from mole_diffusion.core.records import Placing


def placing_of(pipe: Any, given: Mapping[str, Any]) -> Placing:
    """What each forward of a call is for, see `Recorder`.

    A text encoder does not run for embeddings that the caller brings.

    Args:
        pipe: a pipeline with experts, which is being called.
        given: the arguments of the call, by name.
    """
    branches = {"prompt": "prompt_embeds", "negative": "negative_prompt_embeds"}
    encoded = [branch for branch, argument in branches.items() if given.get(argument) is None]

    def place(mixture: Mixture, index: int, entries: int) -> tuple[int | None, int]:
        if mixture.in_picture:
            if not _guided(pipe, given):
                return index, 0
            if pipe.guided_in == "turns":
                return index // 2, entries * (index % 2)
            half = entries // 2
            return index, -half if pipe.guided_in == "batch, prompt first" else half
        return None, entries if encoded[index : index + 1] == ["negative"] else 0

    return place


def _guided(pipe: Any, given: Mapping[str, Any]) -> bool:
    """Whether a call runs a negative prompt beside the prompt."""
    flag = getattr(pipe, "do_classifier_free_guidance", None)
    if flag is not None:
        return bool(flag)
    usual = inspect.signature(pipe.diffusers_class.__call__).parameters.get("true_cfg_scale")
    scale = given.get("true_cfg_scale", 1.0 if usual is None else usual.default)
    named = ("negative_prompt", "negative_prompt_embeds")
    return scale > 1 and any(given.get(name) is not None for name in named)
