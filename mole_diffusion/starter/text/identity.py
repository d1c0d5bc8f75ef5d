"""What tells one text starter from another: its weights, and what its tasks are today."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from mole_diffusion.core.files import file_sha256

from .location import text_experts, text_starter
from .tasks import EXPERTS, UNSEEN

# As many as show a change of a task's wording or rule.
_EXAMPLES = 20


def starter_identity(tasks: Iterable[str], experts: Iterable[str]) -> dict[str, object]:
    """Digests of the base, of experts' weights and of what tasks ask.

    Args:
        tasks: names; those that the starter does not know are left out.
        experts: likewise.

    Returns:
        "base": a digest; "experts" and "tasks": name -> digest.
    """
    known, there = {**EXPERTS, **UNSEEN}, text_experts()
    return {
        "base": file_sha256(text_starter() / "model.safetensors"),
        "experts": {
            name: file_sha256(there[name] / "adapter_model.safetensors")
            for name in sorted(set(experts))
            if name in there
        },
        "tasks": {name: _digest(name) for name in sorted(set(tasks)) if name in known},
    }


def _digest(name: str) -> str:
    task = {**EXPERTS, **UNSEEN}[name]
    told = [(one.source, one.target, one.also) for one in task.examples(_EXAMPLES, "identity", held_out=True)]
    return hashlib.sha256(repr(told).encode()).hexdigest()
